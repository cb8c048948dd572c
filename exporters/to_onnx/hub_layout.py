"""ONNX as ONNX Runtime GenAI and Transformers.js read it: their names, their files, and a stock `model_type`.

Both run graphs whose layers have caches of different widths: they read the shapes from the graph.
"""

from __future__ import annotations

import gc
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedConfig, PreTrainedModel

from exporters.graph_causal_lm import GraphCausalLM
from exporters.parity import Step, kl_divergence, logit_difference
from exporters.to_onnx.matrix_bits import quantize
from exporters.tracing import cache_of, states_of
from exporters.writer import one_line, require
from selfpruner_hub.errors import ExportError, SavedModelError
from selfpruner_hub.models.architectures import architecture_of, shape_of
from selfpruner_hub.models.modeling_selfpruned import MODEL_CLASSES
from selfpruner_hub.models.stock_config import rope_keys

FOLDER = "onnx"
GENAI_CONFIG = "genai_config.json"
SUFFIXES = {"float32": "", "float16": "_fp16", "int8": "_quantized", "int4": "_q4"}
"""Suffixes that Transformers.js appends to the name of a file, by dtype of the weights."""
BITS = {"int8": 8, "int4": 4}
AXES = {
    "batch": "batch_size",
    "length": "sequence_length",
    "past": "past_sequence_length",
    "total": "total_sequence_length",
}
"""Names of the dynamic axes."""
CONFIGURATIONS = ("config.json", "generation_config.json", GENAI_CONFIG)
FLOAT32_FILES = (*CONFIGURATIONS, *(f"{FOLDER}/model.onnx{weights}" for weights in ("", "_data")))
"""Files of an export that `open_graph` reads."""
LEFT_OUT = ("auto_map", "_name_or_path")
"""Keys of a configuration that an export leaves out: classes that are not beside it, and a path of this machine."""
DENSE_WIDTHS_READABLE = "allow_global_per_layer_attribute_access"
"""Key of a configuration by which transformers reads the widths of the dense model from it, in place of an error."""
_CACHE = re.compile(r"(input|output)\.cache\.layers\.(\d+)\.(key|value)s")


def file_of(dtype: str) -> str:
    """Path of the graph of a dtype in an export; its weights are beside it in a file that ends in `_data`."""
    return f"{FOLDER}/model{SUFFIXES[dtype]}.onnx"


def save_hub_graph(program: Any, directory: Path, dtype: str) -> None:
    """Save a graph under the names of its inputs, outputs and axes that the runtimes know.

    Args:
        program: Graph of `trace(…, last=True)`, an `onnx_ir.Model`; its values are renamed.
        directory: Directory of the export.
        dtype: Key of `SUFFIXES`.
    """
    import onnx_ir

    for value in (*program.graph.inputs, *program.graph.outputs):
        if cached := _CACHE.fullmatch(value.name):
            prefix = "past_key_values" if cached[1] == "input" else "present"
            value.name = f"{prefix}.{cached[2]}.{cached[3]}"
            if prefix == "present":
                value.shape = onnx_ir.Shape([AXES["batch"], value.shape[1], AXES["total"], value.shape[3]])
        if value.shape is not None:
            value.shape = onnx_ir.Shape(
                [dim if isinstance(dim, int) else AXES.get(str(dim.value), dim.value) for dim in value.shape]
            )
    path = directory / file_of(dtype)
    path.parent.mkdir(exist_ok=True)
    onnx_ir.save(program, str(path), external_data=f"{path.name}_data")


def save_quantized(directory: Path) -> None:
    """Quantise the matrices of a saved float32 graph to 8 and to 4 bits, each into files of its own.

    Args:
        directory: Directory of the export.
    """
    import onnx_ir

    for dtype, bits in BITS.items():
        program = onnx_ir.external_data.load_to_model(onnx_ir.load(str(directory / file_of("float32"))))
        save_hub_graph(quantize(program, bits), directory, dtype)
        del program
        gc.collect()  # frees reference cycles of the graph


def save_configurations(model: PreTrainedModel, directory: Path) -> None:
    """Write `config.json` for Transformers.js and `genai_config.json` for ONNX Runtime GenAI.

    Args:
        model: Dense or pruned model.
        directory: Directory of the export, which has the tokenizer already.
    """
    config, shape = model.config, shape_of(model.config)
    stock = architecture_of(config).model_type
    values = {key: value for key, value in config.to_dict().items() if key not in LEFT_OUT}
    values |= rope_keys(config) | {
        "model_type": stock,
        "architectures": [type(model).__name__.removeprefix("SelfPruned")],
        "head_dim": shape.head_dim,
        DENSE_WIDTHS_READABLE: True,  # AutoTokenizer and AutoConfig load the stock class, which asks for them
        "transformers.js_config": {
            "use_external_data_format": {Path(file_of(dtype)).name: 1 for dtype in SUFFIXES},
            "kv_cache_dtype": {"fp16": "float16"},
        },
    }
    (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    (directory / GENAI_CONFIG).write_text(json.dumps(_genai(model, stock), indent=2) + "\n", encoding="utf-8")
    _repeat_chat_template(directory)


def _repeat_chat_template(directory: Path) -> None:
    """Copy the chat template into `tokenizer_config.json`: Transformers.js does not read transformers' file of it."""
    template, settings = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    if template.is_file() and settings.is_file():
        values = json.loads(settings.read_text(encoding="utf-8"))
        values.setdefault("chat_template", template.read_text(encoding="utf-8"))
        settings.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_configuration(directory: Path) -> PreTrainedConfig | None:
    """Read the `config.json` that `save_configurations` wrote, in the class of pruned models.

    The class of its stock `model_type` takes no widths by layer.

    Args:
        directory: Directory of an export.

    Returns:
        The configuration; None where the directory has no graphs in this layout.
    """
    if not (directory / GENAI_CONFIG).is_file():
        return None
    values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    values.pop(DENSE_WIDTHS_READABLE, None)  # whoever reads one width of a pruned model here is told
    family = MODEL_CLASSES.get(values.pop("model_type", ""))
    return None if family is None or family.config_class is None else family.config_class.from_dict(values)


def _genai(model: PreTrainedModel, stock: str) -> dict[str, Any]:
    config, shape, generation = model.config, shape_of(model.config), model.generation_config
    widest = max(widths.num_key_value_heads for widths in shape.dense.layers)

    def token(name: str) -> Any:
        value = getattr(generation, name, None)
        return getattr(config, name, None) if value is None else value

    end = token("eos_token_id")
    pad = token("pad_token_id")
    first_end = end[0] if isinstance(end, list) else end
    names = {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    return {
        "model": {
            "type": stock,
            "bos_token_id": token("bos_token_id"),
            "eos_token_id": end,
            "pad_token_id": first_end if pad is None else pad,
            "context_length": config.max_position_embeddings,
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": file_of("float32"),
                "head_size": shape.head_dim,
                "hidden_size": shape.hidden_size,
                "num_attention_heads": widest * shape.queries_per_group,
                "num_key_value_heads": widest,  # the graph has each layer's own
                "num_hidden_layers": shape.num_layers,
                "inputs": {name: name for name in ("input_ids", "attention_mask", "position_ids")} | names,
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": config.max_position_embeddings,
            "past_present_share_buffer": False,  # the graph concatenates its cache
        },
    }


class HubGraph(GraphCausalLM):
    """A graph of this layout in ONNX Runtime, with `generate()`: logits of the last position alone.

    Args:
        path: Path of the graph.
        config: Configuration of the exported model.
        options: Options of ONNX Runtime's session.
        generation_config: Defaults of `generate()`.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        SavedModelError: The graph is missing or damaged.
    """

    def __init__(
        self, path: Path, config: PreTrainedConfig, options: Any, generation_config: GenerationConfig | None = None
    ) -> None:
        require("onnxruntime", "onnx")
        import onnxruntime

        super().__init__(config, generation_config)
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors share no base class
            raise SavedModelError(
                f"{str(path)!r} cannot be loaded, it may be damaged or cut off: {one_line(error)}",
                "Export or download the model again.",
            ) from error
        self._half = any("float16" in value.type for value in self._session.get_inputs())

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of keys and values."""
        return torch.float16 if self._half else torch.float32

    def step(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Cache, logits_to_keep: Tensor
    ) -> tuple[Tensor, Cache]:
        """Run the graph once; see `GraphCausalLM.step`. `logits_to_keep` is always the last position."""
        tensors = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        names = [f"past_key_values.{index}.{what}" for index in range(len(cache.layers)) for what in ("key", "value")]
        tensors |= dict(zip(names, states_of(cache), strict=True))
        outputs = [name.replace("past_key_values", "present") for name in names]
        logits, *states = self._session.run(["logits", *outputs], {name: t.numpy() for name, t in tensors.items()})
        return torch.from_numpy(logits), cache_of([torch.from_numpy(state) for state in states])


def open_graph(directory: Path, options: Any) -> HubGraph:
    """Open the float32 graph of an export of a pruned model.

    Args:
        directory: Directory of the export; `FLOAT32_FILES` of it are read.
        options: Options of ONNX Runtime's session.

    Returns:
        The graph, with `generate()`.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        SavedModelError: The directory holds no such export, or it is damaged.
    """
    config = read_configuration(directory)
    if config is None:
        raise SavedModelError(f"{str(directory)!r} holds no graphs of a pruned model in the layout hub.")
    has_generation_config = (directory / "generation_config.json").is_file()
    generation = GenerationConfig.from_pretrained(directory) if has_generation_config else None
    return HubGraph(directory / file_of("float32"), config, options, generation)


def graphs_difference(
    passes: dict[str, list[Step]], directory: Path, config: PreTrainedConfig, tolerances: dict[str, float], options: Any
) -> float:
    """Compare every graph of an export with PyTorch.

    Args:
        passes: Forward passes in PyTorch by dtype; for 8 and 4 bits, of the model with rounded matrices.
        directory: Directory of the export.
        config: Configuration of the exported model.
        tolerances: Largest allowed distance by dtype: of a logit, for 8 and 4 bits the KL divergence.
        options: Options of ONNX Runtime's sessions.

    Returns:
        The largest distance of a logit of the float32 graph.

    Raises:
        ExportError: Another graph is further from PyTorch than its tolerance.
    """
    differences = {}
    for dtype in SUFFIXES:
        graph = HubGraph(directory / file_of(dtype), config, options)
        differences[dtype] = (kl_divergence if dtype in BITS else logit_difference)(passes[dtype], graph)
        if dtype != "float32" and not differences[dtype] <= tolerances[dtype]:  # NaN too
            measured = "KL divergence" if dtype in BITS else "logit"
            raise ExportError(
                f"{file_of(dtype)} differs from the PyTorch model by {differences[dtype]:.2g} in a {measured}; "
                f"{tolerances[dtype]:.2g} is allowed."
            )
    return differences["float32"]
