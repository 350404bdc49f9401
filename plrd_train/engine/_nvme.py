"""Slices of parameters in files: DeepSpeed's swapper (0.19), as `_deepspeed.build` gives it to a model's parameters.

DeepSpeed keeps a slice in one of a few buffers for as long as its parameter is whole, asserts when all of them are
taken, asks for a parameter twice when reading ahead, and on one CPU lets a whole parameter be its buffer. Here a slice
that was read is copied out of its buffer at once. A write goes through a buffer of the largest slice, where DeepSpeed
takes one of all the parameters of a sub-group, unsharded.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import (
    AsyncPartitionedParameterSwapper,
    PartitionedParamStatus,
)
from torch import Tensor


class Swapper(AsyncPartitionedParameterSwapper):
    """Slices of `dtype`, of at most `largest` elements. Those below 1 MiB are never given to it: DeepSpeed keeps them
    in memory."""

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype, largest: int):
        settings = DeepSpeedConfig(dict(config))
        settings.zero_config.offload_param.buffer_size = largest
        super().__init__(settings, dtype)
        self._absent = torch.empty(1, dtype=dtype)

    def swap_in(self, params: Sequence[Any], async_op: bool = True) -> None:
        distinct = list(dict.fromkeys(params))
        for start in range(0, len(distinct), self.param_buffer_count):
            self.synchronize_reads()  # every buffer is free then
            super().swap_in(distinct[start : start + self.param_buffer_count])
        if not async_op:
            self.synchronize_reads()

    def synchronize_reads(self) -> None:
        arrived = self.inflight_params
        super().synchronize_reads()
        for parameter in arrived:
            values = parameter.ds_tensor.data.clone()
            self.remove_partition_and_release_buffers([parameter])
            parameter.ds_tensor.data, parameter.ds_tensor.status = values, PartitionedParamStatus.AVAILABLE

    def remove_partition_and_release_buffers(self, params: Iterable[Any]) -> None:
        super().remove_partition_and_release_buffers(params)
        # What sets masters and moments compares their length with the slice's, also when that is in its file.
        for parameter in params:
            parameter.ds_tensor.data = self._absent.expand(parameter.ds_tensor.ds_numel)

    def reserve_partitioned_swap_space(self, partition_num_elems: Sequence[int]) -> None:
        super().reserve_partitioned_swap_space([self.elements_per_buffer])

    def swap_out_partitioned_params(self, dst_fp16_params: Sequence[Any], src_fp32_params: Sequence[Tensor]) -> None:
        self.synchronize_reads()
        for parameter, values in zip(dst_fp16_params, src_fp32_params, strict=True):
            super().swap_out_partitioned_params([parameter], [values])
        self.remove_partition_and_release_buffers(dst_fp16_params)

    def end(self) -> None:
        """Free the page-locked buffers, which DeepSpeed keeps for as long as the process lives."""
        self.synchronize_reads()
        self.aio_read_handle.free_cpu_locked_tensor(self.buffers)
        if self.partitioned_swap_buffer is not None:
            self.aio_write_handle.free_cpu_locked_tensor(self.partitioned_swap_buffer)
