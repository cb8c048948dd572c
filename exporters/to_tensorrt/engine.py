"""A TensorRT engine that runs on PyTorch tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from exporters.to_tensorrt.library import Library
from exporters.writer import one_line
from selfpruner_hub.errors import SavedModelError

_SMALLER = "Give it fewer sequences or tokens, or export the model with a larger batch or context."


class TensorRTEngine:
    """A loaded engine with one execution context per profile.

    Args:
        library: TensorRT library.
        serialised: Content of the engine's file.

    Raises:
        SavedModelError: The library cannot load the engine here.
    """

    def __init__(self, library: Library, serialised: bytes) -> None:
        trt = library.module
        self._runtime = trt.Runtime(library.log)
        self._engine = self._runtime.deserialize_cuda_engine(serialised)
        if self._engine is None:
            raise SavedModelError(
                f"{library.name} cannot load the engine: {one_line(library.log.last_error)}",
                "Export the model again here.",
            )
        self._nothing = torch.zeros(1, device=self.device)
        stream = torch.cuda.current_stream()
        self._contexts = [
            self._engine.create_execution_context() for _ in range(self._engine.num_optimization_profiles)
        ]
        for index, context in enumerate(self._contexts):
            context.set_optimization_profile_async(index, stream.cuda_stream)
        stream.synchronize()
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        modes = {name: self._engine.get_tensor_mode(name) for name in names}
        self._outputs = [name for name in names if modes[name] == trt.TensorIOMode.OUTPUT]
        types = {
            trt.DataType.FLOAT: torch.float32,
            trt.DataType.HALF: torch.float16,
            trt.DataType.BF16: torch.bfloat16,
        }
        self._dtypes = {name: types[self._engine.get_tensor_dtype(name)] for name in self._outputs}

    @property
    def device(self) -> str:
        """Device of the inputs and outputs."""
        return "cuda"

    def run(
        self, profile: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Enqueue one pass on PyTorch's current stream.

        Args:
            profile: Index of the profile that the shapes fall into.
            inputs: Contiguous tensors on the GPU, by name.
            outputs: Tensors to write into, by name; None allocates them.

        Returns:
            The outputs by name. They are ready when the stream has finished the pass.

        Raises:
            SavedModelError: The engine refuses the shapes, or the pass fails.
        """
        context = self._contexts[profile]
        for name, tensor in inputs.items():
            address = tensor.data_ptr() or self._nothing.data_ptr()  # an empty tensor has no address
            if not (context.set_input_shape(name, tuple(tensor.shape)) and context.set_tensor_address(name, address)):
                raise SavedModelError(f"The engine takes no {name} of shape {tuple(tensor.shape)}.", _SMALLER)
        tensors = {} if outputs is None else dict(outputs)
        for name in self._outputs:
            if name not in tensors:
                shape = tuple(context.get_tensor_shape(name))
                tensors[name] = torch.empty(shape, dtype=self._dtypes[name], device=self.device)
            context.set_tensor_address(name, tensors[name].data_ptr())
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise SavedModelError("The engine could not be run.", _SMALLER)
        return tensors

    def capturable(self, profile: int) -> bool:
        """Whether a pass of this profile can be captured in a CUDA graph."""
        return bool(self._contexts[profile].is_stream_capturable(torch.cuda.current_stream().cuda_stream))
