"""Llama folders read without `transformers`, which takes longer to import than the first steps of a small model take.

What is not as plain as expected here is left to `transformers`: the functions then return None.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from nlhf.llm.llama import supported

_TOLD = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "rms_norm_eps", "tie_word_embeddings",
)  # fmt: skip
_ODD = ("attention_bias", "auto_map", "mlp_bias", "partial_rotary_factor", "quantization_config", "rope_scaling")
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
_IGNORED = {"backend", "is_local", "local_files_only", "model_max_length", "padding_side", "tokenizer_class"}
_ELSEWHERE = ("added_tokens.json", "additional_chat_templates", "chat_template.jinja", "special_tokens_map.json")


class BareLlama(nn.Module):
    """The weights of a Llama by their names in `transformers`, and what else `Llama.of` asks of a network.

    Args:
        weights: by name.
        files: the contents of `config.json` and, if there is one, `generation_config.json`.
    """

    def __init__(self, weights: Mapping[str, Tensor], files: Mapping[str, dict[str, Any]]) -> None:
        super().__init__()
        self.files, self.config = files, _shape(files["config.json"])
        powers = torch.arange(0, self.config.head_dim, 2).float() / self.config.head_dim
        frequencies = 1.0 / self.config.rope_parameters["rope_theta"] ** powers
        self.inv_freq, self.attention_scaling = nn.Buffer(frequencies, persistent=False), 1.0
        for name, tensor in weights.items():
            at: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                at.add_module(part, inner := at._modules.get(part) or nn.Module())
                at = inner
            at.register_parameter(last, nn.Parameter(tensor))

    def save_pretrained(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the folder that it was read from, with other weights."""
        from safetensors.torch import save_file

        dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
        config = {key: value for key, value in self.files["config.json"].items() if key != "torch_dtype"}
        for name, content in {**self.files, "config.json": config | {"dtype": dtype}}.items():
            _write(folder / name, content)
        save_file(dict(weights), folder / "model.safetensors", {"format": "pt"})


class BareTokenizer:
    """What a policy asks of a tokenizer, answered by the library `tokenizers`. There is no chat template.

    Args:
        tokenizer: of that library.
        config: the contents of `tokenizer_config.json`.
    """

    chat_template = None

    def __init__(self, tokenizer: Any, config: dict[str, Any]) -> None:
        self.tokenizer, self.config, self.eos_token_id = tokenizer, config, tokenizer.token_to_id(config["eos_token"])

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))

    def batch_decode(self, rows: Sequence[Sequence[int]], skip_special_tokens: bool = False) -> list[str]:
        """The text of every row."""
        return list(self.tokenizer.decode_batch(rows, skip_special_tokens=skip_special_tokens))

    def save_pretrained(self, folder: Path) -> None:
        """Write the files that it was read from."""
        self.tokenizer.save(str(folder / "tokenizer.json"))
        _write(folder / "tokenizer_config.json", self.config)


def bare_llama(folder: Path, dtype: torch.dtype) -> BareLlama | None:
    """The network of a folder, if its weights are those of a Llama with plain rotary positions, no more and no less."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    names, whole = ("config.json", "generation_config.json"), folder / "model.safetensors"
    try:
        files = {name: _read(folder / name) for name in names if (folder / name).is_file()}
        shapes = _shapes(_shape(files["config.json"]))
        index = {} if whole.is_file() else _read(folder / "model.safetensors.index.json")["weight_map"]
        parts = {folder / part for part in index.values()} or {whole}
        weights = {name: p for part in sorted(parts) for name, p in load_file(part).items()}
        if {name: p.is_floating_point() and tuple(p.shape) for name, p in weights.items()} != shapes:
            return None
        # copied, lest whoever changes the file change the weights
        weights = {name: weights[name].to(dtype, copy=True) for name in shapes}
        network = BareLlama(weights, files)
    except (OSError, AttributeError, LookupError, TypeError, ValueError, ArithmeticError, SafetensorError):
        return None
    return network if supported(network) else None


def bare_tokenizer(folder: Path) -> BareTokenizer | None:
    """The tokenizer of a Llama's folder, if its `tokenizer.json` is all there is to it."""
    from tokenizers import AddedToken, Tokenizer

    try:
        config = _read(folder / "tokenizer_config.json")
        tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except Exception:  # the library raises no other
        return None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    special = {key: config[key] for key in _SPECIAL if key in config}
    told = [AddedToken(token, normalized=False, special=True) for token in special.values() if isinstance(token, str)]
    plain = (
        "eos_token" in special
        and config.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")
        and config.keys() <= special.keys() | _IGNORED
        and len(told) == len(special)
        and all(token in tokenizer.get_added_tokens_decoder().values() for token in told)
        and not any((folder / name).exists() for name in _ELSEWHERE)
    )
    return BareTokenizer(tokenizer, config) if plain else None


def _shape(config: Mapping[str, Any]) -> SimpleNamespace:
    """What the forward pass depends on, all of which must be told. Raises ValueError if there is more to it."""
    rope = config.get("rope_parameters") or {"rope_type": "default", "rope_theta": config["rope_theta"]}
    odd = [key for key in _ODD if config.get(key)]
    if config["model_type"] != "llama" or odd or rope != {"rope_type": "default", "rope_theta": rope["rope_theta"]}:
        raise ValueError(f"not a plain Llama: {odd or rope}")
    told = {key: config[key] for key in _TOLD}
    told["head_dim"] = config.get("head_dim") or told["hidden_size"] // told["num_attention_heads"]
    return SimpleNamespace(**told, model_type="llama", rope_parameters=rope)


def _shapes(c: SimpleNamespace) -> dict[str, tuple[int, ...]]:
    """Of every weight by name, in the order of `transformers`."""
    d, size, wide, q, kv = c.hidden_size, c.head_dim, c.intermediate_size, c.num_attention_heads, c.num_key_value_heads
    layer = {
        **{f"self_attn.{side}_proj": (heads * size, d) for side, heads in zip("qkv", (q, kv, kv), strict=True)},
        "self_attn.o_proj": (d, q * size),
        "mlp.gate_proj": (wide, d),
        "mlp.up_proj": (wide, d),
        "mlp.down_proj": (d, wide),
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
    }
    modules: dict[str, tuple[int, ...]] = {"model.embed_tokens": (c.vocab_size, d)}
    modules |= {f"model.layers.{i}.{name}": shape for i in range(c.num_hidden_layers) for name, shape in layer.items()}
    modules |= {"model.norm": (d,)} | ({} if c.tie_word_embeddings else {"lm_head": (c.vocab_size, d)})
    return {f"{name}.weight": shape for name, shape in modules.items()}


def _read(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise TypeError(f"{file} holds no settings")
    return content


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
