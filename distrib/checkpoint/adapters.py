"""Which tensors of a model are an adapter, and what they are called in an adapter's own file.

PEFT keeps several adapters in one model (`q_proj.lora_A.default.weight`, `head.modules_to_save.default.weight`) and
leaves their name out of `adapter_model.safetensors`: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

STEM = "adapter_model"  # of the file's name
_NAMED = ("lora_", "ia3_")  # parts of a name after which PEFT puts the adapter's own
_OF_A_TENSOR = ("weight", "bias")
_WHOLE_MODULES = "modules_to_save"


def adapter_key(name: str, adapter: str = "default") -> str | None:
    """Return a parameter's name in the adapter's file; None if it is no part of that adapter.

    A part `lora_*`, `ia3_*` or `adapter*` makes a tensor one of an adapter, and so does PEFT's `modules_to_save`.

    Args:
        name: In the plain model, such as "base_model.model.q.lora_A.default.weight".
        adapter: The adapter's name in PEFT's model.
    """
    parts = name.split(".")
    for at, part in enumerate(parts):
        after = parts[at + 1] if at + 1 < len(parts) else None
        if part == _WHOLE_MODULES:
            return ".".join(parts[:at] + parts[at + 2 :]) if after == adapter else None
        if part.startswith(_NAMED) and after is not None and after not in _OF_A_TENSOR:
            return ".".join(parts[: at + 1] + parts[at + 2 :]) if after == adapter else None
        if part.startswith((*_NAMED, "adapter")):
            return name
    return None
