"""Any Hugging Face causal language model as a policy. transformers and peft are imported when one is loaded."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nlhf.llm.policy import Params, TokenPolicy, alive


class CausalLM(TokenPolicy):
    """A pretrained language model. Prompts are strings; responses are rows of tokens, (B, n, T) padded at the end.

    The network is shared by every policy made of it and is never changed: a policy is the network called with
    parameters of its own. With LoRA these are the adapters, a few megabytes, and the reference is the policy whose
    adapters are zero. The log-probability counts the end token; a response without one is cut at T tokens.

    Args:
        network: a `transformers` causal model, with adapters or without, in evaluation mode.
        tokenizer: its tokenizer, with an end token. A chat template is used if it has one.
        params: the trainable parameters by name.
        max_new_tokens: T.
    """

    def __init__(self, network: nn.Module, tokenizer: Any, params: Params, max_new_tokens: int) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer must have an end-of-sequence token, got none")
        self.network, self.tokenizer, self.params = network, tokenizer, params
        self.length, self.eos = max_new_tokens, tokenizer.eos_token_id

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike[str],
        *,
        max_new_tokens: int = 32,
        lora_rank: int | None = 8,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> CausalLM:
        """Load a local Hugging Face folder, a GGUF file, or a folder with one GGUF file. Nothing is downloaded.

        Args:
            path: the folder or file.
            max_new_tokens: T, the most tokens of a response.
            lora_rank: rank of the adapters on every linear layer; None trains all weights, of which every policy
                then keeps a copy.
            dtype: of the network; adapters are always float32.
            seed: of the adapters' first factor. The second is zero, so the policy starts at the model.

        Raises FileNotFoundError if there is no model at `path`, ModuleNotFoundError without the `llm` extra.
        """
        file, options = _locate(Path(path))
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
            from transformers.utils import logging
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{error}; language models need: pip install 'nlhf[llm]'") from None
        if not sys.stderr.isatty():
            logging.disable_progress_bar()
        tokenizer = AutoTokenizer.from_pretrained(file, **options, local_files_only=True)
        network: Any = AutoModelForCausalLM.from_pretrained(file, **options, dtype=dtype, local_files_only=True)
        network.requires_grad_(lora_rank is None)
        if lora_rank is not None:
            from peft import LoraConfig, get_peft_model

            adapters = LoraConfig(
                r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # peft reads an attribute that transformers deprecates
                network = get_peft_model(network, adapters)
        generator = torch.Generator().manual_seed(seed)
        params = {
            name: _initial_adapter(name, p, generator) if "lora_" in name else p.detach()
            for name, p in network.named_parameters()
            if p.requires_grad
        }
        return cls(network.eval(), tokenizer, params, max_new_tokens)

    def text(self, y: Tensor) -> list[list[str]]:
        """The responses (B, n, T) as strings, without their end tokens."""
        kept = [
            [row[keep].tolist() for row, keep in zip(*pair, strict=True)]
            for pair in zip(y, alive(y, self.eos), strict=True)
        ]
        return [self.tokenizer.batch_decode(rows, skip_special_tokens=True) for rows in kept]

    def encode(self, x: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(B, L) tokens of the prompts, padded on the left, and the mask (B, L) of what is not padding."""
        rows = [self._prompt_tokens(prompt) for prompt in x]
        longest = max(map(len, rows))
        padding = self.tokenizer.eos_token_id
        padded = [[padding] * (longest - len(row)) + row for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(padded), torch.tensor(mask)

    def _prompt_tokens(self, prompt: str) -> list[int]:
        if self.tokenizer.chat_template is None:
            return list(self.tokenizer(prompt)["input_ids"])
        turn = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _logits(self, x: Sequence[str], y: Tensor) -> Tensor:
        """(B, n, T, V) logits before every token of y, in float32; every prompt is read once for its n responses."""
        tokens = y.flatten(0, 1)
        first, (past, mask) = self._read(x, y.shape[1])
        logits = first[:, None]
        if self.length > 1:
            mask = torch.cat([mask, alive(tokens, self.eos)[:, :-1].long()], 1)
            rest = self._call(tokens[:, :-1], mask, past_key_values=past, use_cache=True).logits
            logits = torch.cat([logits, rest.float()], 1)
        return logits.unflatten(0, y.shape[:2])

    def _read(self, x: Sequence[str], n: int) -> tuple[Tensor, Any]:
        tokens, mask = self.encode(x)
        out = self._call(tokens, mask, use_cache=True, logits_to_keep=1)
        out.past_key_values.batch_repeat_interleave(n)
        return out.logits[:, -1].float().repeat_interleave(n, 0), (
            out.past_key_values,
            mask.repeat_interleave(n, 0),
        )

    def _call(self, tokens: Tensor, mask: Tensor, **options: Any) -> Any:
        # Positions count real tokens only: left padding must not shift them.
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions, **options}
        return functional_call(self.network, dict(self.params), (), inputs)

    def log_prob(self, x: Sequence[str], y: Tensor) -> Tensor:
        """(B, n) log pi(y | x), end token included, in nats."""
        logits = self._logits(x, y)
        # gather before normalising: no second tensor of the vocabulary's size
        chosen = logits.gather(-1, y[..., None]).squeeze(-1) - logits.logsumexp(-1)
        return chosen.masked_fill(~alive(y, self.eos), 0.0).sum(-1)

    def next_log_probs(self, x: Sequence[str], y: Tensor) -> Tensor:
        """(B, n, T, V) log pi(. | x, y_<t)."""
        return self._logits(x, y).log_softmax(-1)

    def start(self, x: Sequence[str], n: int) -> tuple[Tensor, Any]:
        """(B n, V) log-probabilities of the first token; every prompt is read once for its n responses."""
        logits, cache = self._read(x, n)
        return logits.log_softmax(-1), cache

    def extend(self, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """(B n, V) log-probabilities of the next token."""
        past, mask = cache
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        out = self._call(tokens[:, None], mask, use_cache=True, past_key_values=past)
        return out.logits[:, -1].float().log_softmax(-1), (out.past_key_values, mask)

    def __repr__(self) -> str:
        weights = sum(p.numel() for p in self.params.values())
        return f"CausalLM({type(self.network).__name__}, trainable={weights}, max_new_tokens={self.length})"


def _locate(path: Path) -> tuple[Path, dict[str, str]]:
    if path.suffix == ".gguf" and path.is_file():
        return path.parent, {"gguf_file": path.name}
    if (path / "config.json").is_file():
        return path, {}
    found = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if len(found) == 1:
        return path, {"gguf_file": found[0].name}
    what = "no such file or folder" if not path.exists() else f"no config.json and {len(found)} GGUF files in it"
    raise FileNotFoundError(f"model {path}: {what}; give a Hugging Face folder or a GGUF file")


def _initial_adapter(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """LoRA: the first factor uniform with variance 1 / (3 fan_in), as peft draws it, the second zero."""
    if "lora_B" in name:
        return torch.zeros(like.shape)
    bound = 1 / math.sqrt(like.shape[1])
    return torch.empty(like.shape).uniform_(-bound, bound, generator=generator)
