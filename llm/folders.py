"""Model folders that plain `transformers` and `peft` load, each written as a whole or not at all."""

from __future__ import annotations

import contextlib
import copy
import gc
import hashlib
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nlhf.llm.bare import BareLlama
from nlhf.llm.policy import Params
from nlhf.llm.processes import place
from nlhf.llm.shards import full, is_sharded


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside `folder` and rename it; an older one is replaced. The first process alone does.

    Raises FileExistsError if `folder` holds a file that the new one does not: it is no older copy.
    """
    if place()[0]:
        return
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as beside:
        new, old = Path(beside, "new"), Path(beside, "old")
        new.mkdir()
        write(new)
        if folder.exists():
            if strange := sorted({file.name for file in folder.iterdir()} - {file.name for file in new.iterdir()}):
                raise FileExistsError(f"folder {folder} holds {strange[0]}, which would be lost: choose another one")
            os.rename(folder, old)
        os.rename(new, folder)


def write_model(folder: Path, network: Any, params: Params, tokenizer: Any) -> None:
    """The network with these parameters, adapters merged into its weights, as `save_pretrained` writes it."""
    tensors = merged(network, params)
    if isinstance(network, BareLlama):
        save = partial(network.save_pretrained, weights=tensors)
    else:
        save = _loaded(network, tensors).save_pretrained
        quiet_in_a_pipe()

    def write(new: Path) -> None:
        save(new)
        tokenizer.save_pretrained(new)

    write_folder(folder, write)


def _loaded(network: Any, tensors: Params) -> Any:
    """A model of `transformers` with these weights, without adapters."""
    plain = network.get_base_model() if hasattr(network, "peft_config") else network
    config = copy.deepcopy(plain.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # a mark that GGUF files leave: the weights are no longer quantised
    with torch.device("meta"):
        model = type(plain)(config)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    if missing := [name for name, p in model.named_parameters() if p.is_meta]:
        raise ValueError(f"network has no parameter {missing[0]}, which a {type(plain).__name__} needs")
    model.config.dtype = next(iter(tensors.values())).dtype
    model.generation_config = plain.generation_config
    return model


def write_adapter(folder: Path, network: Any, params: Params, tokenizer: Any) -> None:
    """The adapters alone, as peft writes them: `PeftModel.from_pretrained(base, folder)` loads them."""
    from safetensors.torch import save_file

    config = copy.deepcopy(network.peft_config["default"])
    config.inference_mode = True
    tensors = {name.replace(".default.", "."): full(p.detach()).cpu().contiguous() for name, p in params.items()}

    def write(new: Path) -> None:
        config.save_pretrained(new)
        save_file(tensors, new / "adapter_model.safetensors", {"format": "pt"})
        tokenizer.save_pretrained(new)

    write_folder(folder, write)


@torch.no_grad()
def merged(network: nn.Module, params: Params) -> dict[str, Tensor]:
    """All weights by the names of `transformers`: adapters added to what they adapt, in float32, then rounded."""
    weights = {**dict(network.named_parameters()), **params}
    weights = {name: full(p).cpu() if is_sharded(p) else p for name, p in weights.items()}
    weights |= {name: b for name, b in network.state_dict().items() if name in dict(network.named_buffers())}
    for name, module in network.named_modules():
        if hasattr(module, "lora_A"):
            at: Any = module
            down, up = (weights[f"{name}.lora_{side}.default.weight"].float() for side in "AB")
            change, base = at.scaling["default"] * (up @ down), f"{name}.base_layer.weight"
            change = change.T if at.fan_in_fan_out else change
            weights[base] = (weights[base].float() + change).to(weights[base].dtype)
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): p.detach().cpu().contiguous()
        for name, p in weights.items()
        if "lora_" not in name
    }


def converted(file: Path, load: Callable[[], tuple[Any, Any]], dtype: torch.dtype) -> tuple[Any, Any] | Path:
    """What `load` makes of a GGUF file; or the folder it was kept in, the next time, which loads ten times as fast.

    It is kept under `nlhf` in the user's cache folder, by the file's content, unless there is no room to spare.
    """
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "nlhf")
    folder = cache / f"{digest}-{str(dtype).removeprefix('torch.')}-transformers-{version('transformers')}"
    if folder.is_dir():
        return folder
    # its progress bar is of no use in a pipe
    with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
        network, tokenizer = load()
    with contextlib.suppress(OSError):  # a cache that cannot be written is no cache
        cache.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(cache).free > 10 * sum(p.numel() * p.element_size() for p in network.parameters()):
            write_model(folder, network, {}, tokenizer)
    return network, tokenizer


def quiet_in_a_pipe() -> None:
    """No progress bars of `transformers` where there is no terminal to show them."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def import_for_good(*modules: str) -> None:
    """Import modules, and look for no garbage in what they make, now or later: a seventh of the time to a first step.

    All that is alive then is never looked at again. So nothing is done if one of them is there already, for there may
    be models that are to go again.
    """
    if any(module in sys.modules for module in modules):
        return
    enabled = gc.isenabled()
    gc.disable()
    try:
        for module in modules:
            import_module(module)
    finally:
        if enabled:
            gc.freeze()
            gc.enable()
