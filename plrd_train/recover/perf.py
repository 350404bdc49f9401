"""Throughput, model FLOPs utilisation and memory of a training step."""

import resource
from dataclasses import dataclass

import torch

# Dense bf16 peak of one device, FLOP/s, by a part of its name (vendor data sheets, without sparsity).
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "MI300X": 1307e12}


@dataclass(frozen=True)
class Perf:
    """`flops_per_token` of forward and backward; `peak` FLOP/s of all devices together, None where the device is
    unknown."""

    flops_per_token: float
    peak: float | None
    device: torch.device

    @classmethod
    def of_model(
        cls, params: int, layers: int, hidden: int, seq_len: int, world_size: int, device: torch.device
    ) -> "Perf":
        """6 FLOPs a parameter and token, and 6 * layers * hidden * seq_len for causal attention (PaLM, arXiv
        2204.02311, appendix B, halved by the mask); recomputation by activation checkpointing is not counted."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peak = next((flops for part, flops in PEAKS.items() if part in name), None)
        return cls(6.0 * params + 6.0 * layers * hidden * seq_len, peak * world_size if peak else None, device)

    def of(self, tokens: int, seconds: float) -> dict[str, float]:
        """The metrics of a step of `tokens` tokens over all ranks in `seconds`."""
        metrics = {"perf/tokens_per_s": tokens / seconds}
        if self.peak is not None:
            metrics["perf/mfu"] = self.flops_per_token * tokens / seconds / self.peak
        on_gpu = self.device.type == "cuda"
        used = (
            torch.cuda.max_memory_allocated(self.device)
            if on_gpu
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        metrics["perf/memory_gib"] = used / 2**30
        return metrics
