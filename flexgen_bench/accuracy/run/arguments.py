"""lm-eval's ``--model_args`` for a system of the suite:
``model=smollm2-135m,weights=4,kv_cache=4,policy=all-cpu,dtype=float32``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexgen_bench.config.build import hardware_profile, to_policy
from flexgen_bench.config.schema import PolicyConf
from flexgen_bench.config.typed import load_choice
from flexgen_bench.core.compression import Compression, Lossy
from flexgen_bench.core.errors import UserError

_OWN_SYSTEM = "flexgen"
# Of lm-eval's own options: the device is ``gpu`` here, and batches are cut by tokens or have the size ``batch_size``
# names.
_OF_LM_EVAL = ("batch_size", "max_batch_size", "device")
_KNOWN = (
    "model",
    "pretrained",
    "system",
    "dtype",
    "gpu",
    "policy",
    "threads",
    "cache_dir",
    "max_length",
    "weights",
    "weights_group",
    "kv_cache",
    "kv_cache_group",
    "value_share",
)


def lm_options(given: Mapping[str, Any], of_lm_eval: Mapping[str, Any]) -> dict[str, Any]:
    """What these arguments ask of ``make_lm``. Raises UserError naming the argument for anything that cannot be.

    model (or pretrained): as for ``make_lm``. system: of conf/system, our engine unless named. gpu, policy: names from
    conf/gpu and conf/policy. weights, kv_cache: bits, or a compression as tables print it (``4-bit/32/outputs``), with
    weights_group and kv_cache_group. value_share: of sparse attention. Other keys are options of the system
    (``offload=disk``).
    """
    arguments = {key: value for key, value in given.items() if key not in _OF_LM_EVAL}
    model = arguments.get("model", arguments.get("pretrained"))
    if model is None:
        raise UserError("model_args", dict(given), "given a model", "Add model=NAME or model=FOLDER.")
    hardware = hardware_profile(str(arguments.get("gpu", "auto")))
    policy = None
    if arguments.get("policy") is not None:
        policy = to_policy(load_choice(PolicyConf, "policy", str(arguments["policy"])), hardware)
    lossy = Lossy(
        weights=_compression(arguments, "weights"),
        kv_cache=_compression(arguments, "kv_cache"),
        value_share=arguments.get("value_share", 1.0),
    )
    batch_size = str(of_lm_eval.get("batch_size"))
    return {
        "system": str(arguments.get("system", _OWN_SYSTEM)),
        "model": str(model),
        "lossy": lossy,
        "gpu": hardware,
        "policy": policy,
        "batch_size": int(batch_size) if batch_size.isdecimal() else None,
        "options": {key: value for key, value in arguments.items() if key not in _KNOWN},
        **{key: arguments.get(key) for key in ("dtype", "threads", "cache_dir", "max_length")},
    }


def _compression(arguments: Mapping[str, Any], name: str) -> Compression | None:
    return Compression.parse(arguments.get(name), arguments.get(f"{name}_group", 64))
