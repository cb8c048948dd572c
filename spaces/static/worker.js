// The two models, in a worker so that the page stays alive while they compute. One is run at a time.
import {
  AutoModelForCausalLM, AutoTokenizer, InterruptableStoppingCriteria, TextStreamer, env,
} from 'https://cdn.jsdelivr.net/npm/@huggingface/transformers@4.3.2/dist/transformers.min.js';

const FOLDERS = { pruned: 'onnx', dense: 'dense' };
const stopping = new InterruptableStoppingCriteria();
const loaded = {};
let settings;
let device;
let tokenizer;

async function start(given) {
  settings = given;
  env.allowLocalModels = false;
  env.remoteHost = settings.host;
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  device = adapter ? 'webgpu' : 'wasm';
  tokenizer = await AutoTokenizer.from_pretrained(settings.graphs, where());
  postMessage({ kind: 'ready', device, half: Boolean(adapter?.features.has('shader-f16')) });
}

function where() {
  return settings.revision ? { revision: settings.revision } : {};
}

async function load(which, dtype) {
  if (loaded[which]?.dtype === dtype) return loaded[which].model;
  await loaded[which]?.model.dispose();
  delete loaded[which];
  const arrived = {};
  const progress_callback = ({ status, file, loaded: bytes, total }) => {
    if (status !== 'progress') return;
    arrived[file] = [bytes, total];
    const [done, all] = Object.values(arrived).reduce(([a, b], [c, d]) => [a + c, b + d], [0, 0]);
    postMessage({ kind: 'loading', which, done, all });
  };
  const options = { ...where(), subfolder: FOLDERS[which], dtype, device, progress_callback };
  const model = await AutoModelForCausalLM.from_pretrained(settings.graphs, options);
  loaded[which] = { dtype, model };
  const forward = model.forward.bind(model);
  model.forward = async (inputs) => {
    await turn();
    return forward(inputs);
  };
  await model.generate({ ...tokenizer('a'), max_new_tokens: 2, do_sample: false }); // the first pass is slow
  return model;
}

// Lets waiting messages in: on WebAssembly, a model computes without a pause, and a stop would be heard at the end.
function turn() {
  const { port1, port2 } = new MessageChannel();
  return new Promise((resolve) => {
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}

function encode(prompt) {
  if (!tokenizer.chat_template) return tokenizer(prompt);
  const messages = [{ role: 'user', content: prompt }];
  return tokenizer.apply_chat_template(messages, { add_generation_prompt: true, return_dict: true });
}

async function answer(which, { prompt, tokens, dtype }) {
  const model = await load(which, dtype);
  if (stopping.interrupted) return;
  const started = performance.now();
  let first = null;
  let count = 0;
  let seconds = 0;
  const streamer = new TextStreamer(tokenizer, {
    skip_prompt: true,
    skip_special_tokens: true,
    token_callback_function: (ids) => {
      count += ids.length;
      seconds = (performance.now() - started) / 1000;
      first ??= seconds;
    },
    callback_function: (text) => postMessage({ kind: 'text', which, text, count, first, seconds }),
  });
  const limits = { max_new_tokens: tokens, do_sample: false };
  await model.generate({ ...encode(prompt), ...limits, streamer, stopping_criteria: stopping });
  postMessage({ kind: 'done', which, count, first, seconds });
}

onmessage = async ({ data }) => {
  if (data.kind === 'stop') {
    stopping.interrupt();
    return;
  }
  let which;
  try {
    if (data.kind === 'start') await start(data.settings);
    if (data.kind !== 'ask') return;
    stopping.reset();
    for (which of Object.keys(FOLDERS)) {
      if (!stopping.interrupted) await answer(which, data);
    }
    postMessage({ kind: 'finished' });
  } catch (error) {
    postMessage({ kind: 'failed', which, why: String(error?.message ?? error) });
  }
};
