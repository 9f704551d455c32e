"""How ZeRO stage 3 brings weights to its GPUs: matrix after matrix, the next ones while one computes, for every batch
and token anew.

Several GPUs hold a slice of every tensor each: a GPU loads its slice over its own link and gets the others from its
neighbours. GPUs whose model fits into one machine's memory are taken to be in one machine and exchange over its links
to GPUs; others stand in a machine each and exchange over the network.
"""

from __future__ import annotations

from dataclasses import dataclass

from baselines.common.hf_model import HFModel, Parts
from flexgen_bench.core.tiers import Tier

# Buffers for reads from NVMe, of the largest tensor each (the configuration of the FlexGen authors' runs).
NVME_BUFFERS = 5
# Squares of the hidden size that are fetched ahead of the matrix in use: stage3_prefetch_bucket_size and
# stage3_max_live_parameters of the example that ZeRO-Inference's authors give (microsoft/DeepSpeedExamples).
FETCHED_AHEAD = 2
REMEDY = "Lower system.options.batch_size."


@dataclass(frozen=True)
class Loading:
    """Where weights lie and how many bytes they have there (``stored_bytes``); rates in bytes/s.

    link: what a GPU gets from page-locked memory. disk: what is read around the page cache. network: between machines.
    fragmentation: what growing KV caches take over their size.
    """

    model: HFModel
    mode: str
    stored_bytes: float
    num_gpus: int
    link: float
    disk: float
    network: float
    fragmentation: float

    @property
    def in_one_machine(self) -> bool:
        machine = self.model.machine
        host = machine.host_bytes
        return self.num_gpus == 1 or host is None or self.stored_bytes + machine.host_process_bytes <= host

    @property
    def machine_bytes(self) -> float:
        """Of weights in the fullest machine."""
        return self.stored_bytes / (1 if self.in_one_machine else self.num_gpus)

    def parts(self) -> Parts:
        """Seconds of bringing all weights in once."""
        share = self.stored_bytes / self.num_gpus
        if self.mode == "nvme":
            # Into page-locked host buffers, then over the link. GPUs of a machine share its disk.
            here = self.stored_bytes if self.in_one_machine else share
            read_s = here / self.disk
            loads = {"disk_read: weights": read_s, "h2d: weights": share / self.link}
        else:
            loads = {"h2d: weights": share / self.link}
        if self.num_gpus > 1:
            others = (self.num_gpus - 1) * share
            if self.in_one_machine:
                loads["d2h: exchange of weights"] = others / self.model.machine.h2d
            else:
                loads["network: exchange of weights"] = others / self.network
        return loads

    def seconds(self) -> float:
        """The same: the disk, the link and the exchange work beside each other."""
        return max(self.parts().values())

    @property
    def buffers(self) -> float:
        """Bytes of the matrix in use and of what is fetched ahead, as stored."""
        size = self.model.size
        ahead = size.bytes_of(FETCHED_AHEAD * size.shape.hidden_size**2)
        return self.stored_bytes / size.weight_bytes * (size.largest_matrix_bytes + ahead)

    def check(self, batch: int, unpacked: float = 0.0, *, cache_here: bool = True) -> dict[Tier, Parts]:
        """Bytes of one GPU and its machine with ``batch`` sequences on each GPU. unpacked: bytes of weights. Raises
        DoesNotFit."""
        model, size = self.model, self.model.size
        here = Tier.GPU if model.machine.has_gpu else Tier.CPU
        table = size.bytes_of(size.table_values)
        working = model.working_parts(batch, cache_here=cache_here, fragmentation=self.fragmentation)
        weights = {"weights": self.buffers + unpacked, "token table": table}
        needed: dict[Tier, Parts] = {here: {**weights, **working}}
        host = needed.setdefault(Tier.CPU, {})
        host["process"] = model.machine.host_process_bytes
        if not cache_here:
            host["kv_cache"] = self._batches_per_machine * model.cache_bytes(batch, model.prompt_len + model.gen_len)
        if self.mode == "nvme":
            host["read buffers"] = NVME_BUFFERS * size.largest_matrix_bytes
            needed[Tier.DISK] = {"weights": self.machine_bytes}
        else:
            host["weights"] = self.machine_bytes
        for tier, parts in needed.items():
            model.machine.check(tier, parts, REMEDY)
        return needed

    @property
    def _batches_per_machine(self) -> int:
        return self.num_gpus if self.in_one_machine else 1
