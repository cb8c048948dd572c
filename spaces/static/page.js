// The page: it sends a prompt to the worker, and shows both answers and how fast they were written.
const FEW = 24; // tokens below which a rate is uncertain

const at = (id) => document.getElementById(id);
const worker = new Worker('worker.js', { type: 'module' });
const rates = {};

function rate({ count, first, seconds }) {
  return count > 1 && seconds > first ? (count - 1) / (seconds - first) : null;
}

function took(told) {
  const speed = rate(told);
  const start = speed ? `${speed.toFixed(1)} tokens/s · ` : '';
  return `${start}first token after ${told.first.toFixed(2)} s · ${told.count} tokens`;
}

function verdict() {
  const { pruned, dense } = rates;
  if (!pruned?.rate || !dense?.rate) return '';
  const few = Math.min(pruned.count, dense.count) < FEW ? '; so few tokens tell little' : '';
  const ratio = (pruned.rate / dense.rate).toFixed(2);
  return `The pruned model wrote at ${ratio} × the speed of its parent, on this machine and this prompt${few}.`;
}

function free(asking) {
  at('compare').disabled = asking;
  at('stop').disabled = !asking;
}

const told = {
  ready({ device, half }) {
    const name = device === 'webgpu' ? 'WebGPU' : 'the processor (WebAssembly: there is no WebGPU here)';
    at('where').textContent = `Runs on ${name}. The models are downloaded when they are first asked.`;
    at('dtype').querySelector('[value=fp16]').disabled = !half;
    free(false);
  },
  loading({ which, done, all }) {
    at(`${which}-took`).textContent = `downloading: ${(done / 1e6).toFixed(0)} of ${(all / 1e6).toFixed(0)} MB`;
  },
  text({ which, text, ...timing }) {
    at(which).textContent += text;
    at(`${which}-took`).textContent = took(timing);
  },
  done({ which, ...timing }) {
    at(`${which}-took`).textContent = took(timing);
    rates[which] = { rate: rate(timing), count: timing.count };
  },
  finished() {
    for (const which of ['pruned', 'dense']) if (!rates[which]) at(`${which}-took`).textContent = 'stopped';
    at('verdict').textContent = verdict();
    free(false);
  },
  failed({ which, why }) {
    at(which ? `${which}-took` : 'where').textContent = `⚠️ ${which ? `The ${which} model` : 'The model'} cannot be run: ${why}`;
    if (which === 'pruned') at('dense-took').textContent = '';
    free(!which);
    at('stop').disabled = true;
  },
};

worker.onmessage = ({ data }) => told[data.kind](data);
worker.onerror = () => told.failed({ why: 'the library could not be loaded.' });

at('ask').addEventListener('submit', (event) => {
  event.preventDefault();
  for (const which of ['pruned', 'dense']) {
    at(which).textContent = '';
    at(`${which}-took`).textContent = which === 'pruned' ? 'loading the model …' : 'waiting for the pruned model …';
    delete rates[which];
  }
  at('verdict').textContent = '';
  free(true);
  worker.postMessage({
    kind: 'ask', prompt: at('prompt').value, tokens: Number(at('tokens').value), dtype: at('dtype').value,
  });
});
at('stop').addEventListener('click', () => worker.postMessage({ kind: 'stop' }));

const settings = await (await fetch('model.json')).json();
document.title = at('title').textContent = settings.title;
at('about').textContent = settings.about;
for (const which of ['pruned', 'dense']) {
  at(`${which}-name`).textContent += `: ${settings.parameters[which].toLocaleString('en')} parameters`;
}
worker.postMessage({ kind: 'start', settings });
