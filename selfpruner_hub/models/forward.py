"""How many windows one forward pass takes: few on a CPU, which more do not make faster; what fits on an accelerator."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from accelerate.utils import find_executable_batch_size
from transformers import PreTrainedModel

from selfpruner_hub.errors import ModelError

ON_ACCELERATORS = 16
"""Times as many tokens are tried first on an accelerator."""

_known: WeakKeyDictionary[PreTrainedModel, dict[int, int]] = WeakKeyDictionary()


@torch.inference_mode()
def windows_at_once(model: PreTrainedModel, width: int, tokens: int) -> int:
    """Count the windows that go through the decoder together.

    On an accelerator this is tried once for each width, with the layers that the model has then: a tenth fewer as often
    as memory ends. So the dense model goes first, and candidates, which take no more, keep to it.

    Args:
        model: A causal language model.
        width: Tokens of a window.
        tokens: In one pass on a CPU.

    Returns:
        At least 1.

    Raises:
        ModelError: Not even one window fits.
    """
    if model.device.type == "cpu":
        return max(1, tokens // width)
    known = _known.setdefault(model, {})
    if width not in known:

        def tried(windows: int) -> int:
            model.get_decoder()(torch.zeros(windows, width, dtype=torch.long, device=model.device), use_cache=False)
            return windows

        try:
            known[width] = find_executable_batch_size(tried, max(1, ON_ACCELERATORS * tokens // width))()
        except RuntimeError as error:
            if "No executable batch size" not in str(error):
                raise
            raise ModelError(
                f"Not one window of {width} tokens fits in the memory of {model.device}.",
                "Use shorter windows, or a CPU with offload_folder.",
            ) from error
    return known[width]
