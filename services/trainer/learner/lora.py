"""LoRA adapters by peft. Imported where there is one: to import peft takes a second or two of computing."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from mulligan.common.errors import invalid_field
from mulligan.trainer.settings import LoraSettings


def attach(base: Any, settings: LoraSettings, seed: int) -> PeftModel:
    """Adds LoRA to `base` in place. The adapter's random initial weights depend on the seed only."""
    alpha = 2.0 * settings.rank if settings.alpha is None else settings.alpha
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft types it as int and divides it by the rank
        target_modules=list(settings.target_modules) or "all-linear",
        lora_dropout=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            adapter = get_peft_model(base, config)
        except ValueError as error:  # a name that no layer has
            raise invalid_field("model.lora.target_modules", f"names of linear layers ({error})"[:1000]) from error
    _refuse_unservable(adapter)
    layers: list[Any] = [module for module in adapter.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        # peft would copy the input to float32, the type of the adapter; autocast computes in its own type anyway.
        layer.cast_input_dtype_enabled = False
    return adapter


def kinds(adapter: PeftModel) -> tuple[str, ...]:
    """The last parts of the names of the layers that have an adapter, such as `q_proj`."""
    return tuple(sorted({name.rpartition(".")[2] for name in _adapted(adapter)}))


def _adapted(adapter: PeftModel) -> dict[str, torch.nn.Module]:
    """The base layers that have an adapter, by name."""
    model: Any = adapter.base_model.model
    return {
        name: module.get_base_layer() for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
    }


def _refuse_unservable(adapter: PeftModel) -> None:
    """Refuses adapters that no policy can serve: of layers that are not linear, or share weights with another layer."""
    layers = _adapted(adapter)
    model = cast(Any, adapter.base_model.model)
    holders: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.nn.Parameter):
            holders.setdefault(id(weight), set()).add(name.removesuffix(".base_layer"))
    for name, layer in layers.items():
        tied = sorted(holders.get(id(layer.weight), set()) - {name})
        kind = type(layer).__name__
        if tied:
            problem = f"{name} is tied to {tied[0]}, which has the same weights: an adapter of one would change both"
        elif not isinstance(layer, torch.nn.Linear):
            problem = f"{name} is of the kind {kind}"
        else:
            continue
        raise invalid_field("model.lora.target_modules", f"linear layers with weights of their own ({problem})")
