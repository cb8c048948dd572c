"""GGUF files: what llama.cpp computes from them is what PyTorch computes."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
import tracemalloc

import pytest
import torch
from gguf import GGUFReader
from support.chatting import TEMPLATE
from support.processes import run_python
from support.tiny import CONFIGS, tiny_model, tiny_pruned
from support.trained import VOCABULARY, trained_tokenizer

from exporters.export import export, export_model
from exporters.to_gguf.dtypes import GGUF_DTYPES
from exporters.to_gguf.folds import WRITABLE
from exporters.to_gguf.llama_cpp import GreedyStep, LlamaCpp, gguf_difference, greedy_steps, log_probability_difference
from exporters.to_gguf.writer import write
from selfpruner_hub.errors import ExportError, MissingExtraError, ModelError, UserError
from selfpruner_hub.models.architectures import shape_of
from selfpruner_hub.storage.export_record import read_export

ROPE = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "linear": {"factor": 4.0},
}
CASES = {
    **{name: {} for name in ("llama", "llama-mha-tied", "mistral", "qwen2", "phi3", "granite")},
    "qwen3 tied": {"tie_word_embeddings": True},
    "llama llama3": {"mlp_bias": True, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **ROPE["llama3"]}},
    "mistral linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, **ROPE["linear"]}},
}
"""Types that differ in what the writer does; test_gguf_folds.py has all of them, in float32."""
EXPECTED = {"f32": 5e-5, "f16": 0.02, "q8_0": 0.5}
"""Measured at most: 7e-6, 0.009 and 0.29."""


def built(make, case: str):
    return make(case.split()[0], vocab_size=VOCABULARY, **CASES[case])


@pytest.fixture(scope="module", autouse=True)
def runtime():
    pytest.importorskip("xllamacpp")


@pytest.mark.parametrize("dtype", EXPECTED)
@pytest.mark.parametrize("make", [tiny_model, tiny_pruned])
@pytest.mark.parametrize("case", CASES)
def test_log_probabilities_are_those_of_pytorch(case, make, dtype, tmp_path):
    model = built(make, case)
    written = write(model, trained_tokenizer(), tmp_path, dtype=dtype)
    assert written.compare()() <= EXPECTED[dtype] <= written.tolerance
    reader = GGUFReader(tmp_path / f"model-{dtype}.gguf")
    arch = reader.fields["general.architecture"].contents()
    row = WRITABLE[CONFIGS[case.split()[0]].model_type]
    assert arch == (row.equal if make is tiny_model else row.by_layer)
    if make is tiny_pruned:
        widths = [w.intermediate_size for w in shape_of(model.config).dense.layers]
        written_widths = reader.fields[f"{arch}.feed_forward_length"].contents()
        multiple = 32 if dtype == "q8_0" else 1
        assert written_widths == [-(-width // multiple) * multiple for width in widths]
        assert len(set(widths)) > 1


def test_the_comparison_notices_a_wrong_file(tmp_path):
    """A model with other weights, or another rotary base, is told apart."""
    model = built(tiny_pruned, "llama")
    write(model, trained_tokenizer(), tmp_path, dtype="f32")
    path = tmp_path / "model-f32.gguf"
    assert log_probability_difference(greedy_steps(model, 64), path) < 1e-4
    other = built(tiny_pruned, "llama")
    other.model.layers[2].mlp.down_proj.weight.data[0, 0] += 0.5
    assert log_probability_difference(greedy_steps(other, 64), path) > 1e-3
    turned = tiny_pruned("llama", vocab_size=VOCABULARY, rope_parameters={"rope_type": "default", "rope_theta": 2e4})
    assert log_probability_difference(greedy_steps(turned, 64), path) > 1e-3


class Says:
    """A file in llama.cpp that gives these log-probabilities after any tokens."""

    def __init__(self, found):
        self.found = found

    def likeliest(self, _ids):
        return self.found


@pytest.mark.parametrize("by", [0.5, -0.5])
def test_a_difference_counts_in_both_directions(by):
    likely = torch.tensor([0.7, 0.2, 0.1]).log()
    theirs = {index: value + by for index, value in enumerate(likely.tolist())}
    assert gguf_difference([GreedyStep([1], likely)], Says(theirs)) == pytest.approx(0.5)
    assert math.isnan(gguf_difference([GreedyStep([1], likely)], Says({**theirs, 1: math.nan})))


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    """What numpy holds while a file is written is a few times its largest tensor, not the model."""
    model = tiny_pruned("llama", vocab_size=VOCABULARY, hidden_size=64, intermediate_size=512)
    sizes = [4 * parameter.numel() for parameter in model.parameters()]
    assert sum(sizes) > 10 * max(sizes)
    write(model, trained_tokenizer(), tmp_path)  # what is imported and cached, once
    for dtype in GGUF_DTYPES:
        tracemalloc.start()
        write(model, trained_tokenizer(), tmp_path, dtype=dtype)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 * max(sizes)


def test_a_file_brings_its_chat_template(tmp_path):
    tokenizer = trained_tokenizer()
    tokenizer.chat_template = TEMPLATE
    write(built(tiny_pruned, "llama"), tokenizer, tmp_path)
    assert GGUFReader(tmp_path / "model-f16.gguf").fields["tokenizer.chat_template"].contents() == TEMPLATE


def test_tied_embeddings_are_stored_once(tmp_path):
    write(built(tiny_pruned, "llama-mha-tied"), trained_tokenizer(), tmp_path, dtype="f32")
    names = {tensor.name for tensor in GGUFReader(tmp_path / "model-f32.gguf").tensors}
    assert "token_embd.weight" in names
    assert "output.weight" not in names
    write(built(tiny_pruned, "llama"), trained_tokenizer(), tmp_path, dtype="f16")
    assert "output.weight" in {tensor.name for tensor in GGUFReader(tmp_path / "model-f16.gguf").tensors}


def test_mistakes(tmp_path):
    model = built(tiny_pruned, "llama")
    with pytest.raises(UserError, match="Unknown dtype 'q3_k'.*f32, f16, q8_0"):
        write(model, trained_tokenizer(), tmp_path, dtype="q3_k")
    with pytest.raises(UserError, match="tokenizer, and there is none"):
        write(model, None, tmp_path)
    with pytest.raises(ModelError, match="not a readable GGUF file"):
        write(model, None, tmp_path, tokenizer_from=str(tmp_path))


def test_an_export_and_its_record(tmp_path):
    directory = tmp_path / "model"
    built(tiny_model, "qwen2").save_pretrained(directory)
    trained_tokenizer().save_pretrained(directory)
    export(directory, "gguf", tmp_path / "out", dtype="q8_0")
    record = read_export(tmp_path / "out", "gguf")
    assert record.options == {"dtype": "q8_0", "tokenizer_from": None, "imatrix": None}
    assert 1e-3 < record.max_difference <= record.tolerance
    assert {"gguf", "xllamacpp"} <= set(record.versions)
    assert (tmp_path / "out" / "model-q8_0.gguf").is_file()


def test_nothing_is_left_of_an_export_that_differs(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "exporters.to_gguf.folds._divisors", lambda frequencies, theta, head_dim: torch.full_like(frequencies, 3.0)
    )
    with pytest.raises(ExportError, match="differs from the PyTorch model by .* in a log-probability"):
        export_model(built(tiny_pruned, "llama"), trained_tokenizer(), "gguf", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_when_writing_fails(tmp_path, monkeypatch):
    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gguf.GGUFWriter.write_tensor_data", full)
    with pytest.raises(UserError, match="No space left on device"):
        export_model(built(tiny_pruned, "llama"), trained_tokenizer(), "gguf", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_another_tokenizer_than_the_files_is_noticed(tmp_path):
    model = built(tiny_pruned, "llama")
    write(model, trained_tokenizer("gpt-2"), tmp_path, dtype="f32")
    with pytest.raises(ExportError, match="reads text as other tokens"):
        log_probability_difference(greedy_steps(model, 64), tmp_path / "model-f32.gguf", trained_tokenizer("qwen2"))


def test_without_xllamacpp(tmp_path, monkeypatch):
    """The file is written all the same, and the record says that nobody has run it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    written = write(built(tiny_pruned, "llama"), trained_tokenizer(), tmp_path)
    assert written.compare is None
    assert written.unchecked == "xllamacpp is not installed"
    with pytest.raises(MissingExtraError, match="xllamacpp is not installed"):
        LlamaCpp(tmp_path / "model-f16.gguf", 64)


LOAD = """
import sys
from pathlib import Path
from exporters.to_gguf.llama_cpp import LlamaCpp
from selfpruner_hub.errors import ModelError
for path in sys.argv[1:]:
    try:
        LlamaCpp(Path(path), 64)
    except ModelError as error:
        print(error)
"""


UNUSED = """
import sys
from pathlib import Path
from exporters.to_gguf.llama_cpp import LlamaCpp, greedy_steps
for _ in range(50):
    LlamaCpp(Path(sys.argv[1]), 64, 1)
print("done")
"""


def test_a_model_that_was_never_asked_ends(tmp_path):
    """In a process of its own, which can be ended where it hangs: a server whose thread had not begun never stopped."""
    write(built(tiny_pruned, "llama"), trained_tokenizer(), tmp_path)
    command = [sys.executable, "-c", UNUSED, tmp_path / "model-f16.gguf"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout == "done\n", done.stderr[-500:]


def test_a_model_is_given_out_once_its_thread_answers(tmp_path, monkeypatch):
    """Whatever the timing: the last call of the constructor is one that the server's own thread answers."""
    import xllamacpp

    called = []

    class Server:
        def __init__(self, parameters):
            called.append(parameters.endpoint_metrics)

        def __getattr__(self, name):
            return lambda: called.append(name)

    monkeypatch.setattr(xllamacpp, "Server", Server)
    LlamaCpp(tmp_path / "none.gguf", 64)
    assert called == [True, "handle_metrics"]


@pytest.fixture
def loaded(tmp_path):
    write(built(tiny_pruned, "llama"), trained_tokenizer(), tmp_path)
    return LlamaCpp(tmp_path / "model-f16.gguf", 64)


def test_a_stream_is_the_whole_answer_in_pieces(loaded):
    whole = loaded.complete([5, 6, 7], 12, ignore_eos=False)
    pieces = []
    loaded.stream([5, 6, 7], 12, lambda *piece: pieces.append(piece))
    assert "".join(text for text, _ in pieces) == whole["choices"][0]["text"]
    counts = [count for _, count in pieces]
    assert counts[-1] == whole["timings"]["predicted_n"]
    assert counts == sorted(counts)
    assert len(set(counts)) > 3


def test_a_stream_ends_when_it_is_told_to(loaded):
    pieces = []
    loaded.stream([5, 6, 7], 40, lambda *piece: pieces.append(piece) or len(pieces) == 3)
    assert len(pieces) == 3
    loaded.stream([5, 6, 7], 4, lambda *piece: pieces.append(piece))  # and another begins
    assert len(pieces) > 3


def test_what_the_callback_raises_is_raised(loaded):
    with pytest.raises(ZeroDivisionError):
        loaded.stream([5, 6, 7], 12, lambda *piece: 1 / 0)


def test_what_llama_cpp_refuses_is_one_line(loaded):
    with pytest.raises(ModelError, match=r"llama\.cpp does not run the model: .*context"):
        loaded.stream([5] * 300, 12, lambda *piece: False)
    with pytest.raises(ModelError, match=r"llama\.cpp does not run the model: .*context"):
        loaded.complete([5] * 300, 12)


def test_a_truncated_file_is_one_line(tmp_path):
    """In a process of its own: llama.cpp is C++, and could take the test session with it."""
    write(built(tiny_pruned, "llama"), trained_tokenizer(), tmp_path)
    content = (tmp_path / "model-f16.gguf").read_bytes()
    paths = [tmp_path / f"{index}.gguf" for index in range(4)]
    for path, kept in zip(paths, (0, 40, 0.3 * len(content), 0.99 * len(content)), strict=True):
        path.write_bytes(content[: int(kept)])
    done = run_python(LOAD, *paths)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.splitlines() == [f"llama.cpp cannot load {str(p)!r}. Export the model again." for p in paths]


def test_files_of_an_earlier_model_do_not_stay_beside_those_of_a_new_one(tmp_path):
    """A demo would run the older file."""
    model, tokenizer = tiny_model("llama", vocab_size=VOCABULARY), trained_tokenizer()
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "mine.txt").write_text("stays")
    for dtype in ("f16", "f32"):
        export_model(model, tokenizer, "gguf", tmp_path / "gguf", dtype=dtype, tolerance=math.inf)
    assert {path.name for path in (tmp_path / "gguf").glob("*.gguf")} == {"model-f16.gguf", "model-f32.gguf"}
    model.lm_head.weight.data[3] *= 2
    export_model(model, tokenizer, "gguf", tmp_path / "gguf", dtype="f32", tolerance=math.inf)
    assert {path.name for path in (tmp_path / "gguf").glob("*.gguf")} == {"model-f32.gguf"}
    assert (tmp_path / "gguf" / "mine.txt").exists()
