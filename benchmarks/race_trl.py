"""The race of training steps against TRL and against a loop of plain torch: one step, everything in it.

    pip install --no-deps --target /tmp/trl-nash trl==1.13.0  # the last with Nash-MD
    pip install --no-deps --target /tmp/trl trl
    python benchmarks/race_trl.py --trl /tmp/trl --trl-nash /tmp/trl-nash --out runs/race-trl

Llama of 0.98 M parameters, prompts of 16 words, responses of exactly as many tokens as the row says, float32, two
threads. Every contestant is a process of its own; they take turns, and the medians are over their steps, without the
first of a turn and without those during which other programs took more than 0.15 cores, unless too few are left.

All start from one model folder, and a step is the same for all: of Nash-MD and magnetic MD one response of the policy
and one of the opponent for each of 32 prompts, of online DPO and IPO two for each of 32, of GRPO and RLOO eight for
each of four, of DPO and IPO 32 pairs. Ours and the plain loop read a prompt once for all its responses, TRL for every
one. Its Nash-MD runs without a cache: with one it samples another law. Magnetic MD, which TRL has not, is compared with
its Nash-MD.

A ratio that ends in "x" is peer / ours. --quick shows that everything runs and judges nothing. Takes fifteen minutes.
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from importlib.metadata import version
from itertools import count
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple, TextIO, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

# Workers import what they need and nothing else, in the functions below: their cold start is timed.

RATE, BETA = 1e-4, 0.1
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
ENVIRONMENT |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "CUDA_VISIBLE_DEVICES": ""}
WIDTHS = {"work": 30, "ours": 8, "peer": 22, "peer's": 8, "ratio": 14, "target": 8, "met": 3, "peak MB": 12}
GROUPS = {"GRPO": 8, "RLOO": 8}  # responses per prompt; two for the others, the MDs' one each of policy and opponent


class Work(NamedTuple):
    """What is timed, and its sizes."""

    algorithm: str
    tokens: int
    layers: int = 4
    width: int = 128
    vocabulary: int = 1000
    batch: int = 32
    prompt: int = 16

    @property
    def prompts(self) -> int:
        """Per step."""
        return self.batch // GROUPS.get(self.algorithm, 1)


Lap: TypeAlias = Callable[[], None]
Contestant: TypeAlias = Callable[[Work, Path, Lap], None]
"""Loads the model of a folder, takes steps for ever, and calls `Lap` after each."""


# The world


def sentences(work: Work, n: int, length: int, seed: int) -> tuple[Tensor, list[str]]:
    """(n, length) random words."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, work.vocabulary, (n, length), generator=generator)
    return tokens, [" ".join(f"w{i}" for i in row) for row in tokens.tolist()]


def batches(work: Work) -> Iterator[list[int]]:
    """Rows of the 256 prompts."""
    for step in count():
        yield [(step * work.prompts + i) % 256 for i in range(work.prompts)]


class Taste:
    """A score for every word; the reward is the mean, and P(a > b) its logistic difference."""

    def __init__(self, work: Work) -> None:
        self.scores = torch.randn(work.vocabulary, generator=torch.Generator().manual_seed(1))
        self.words = {f"w{i}": score for i, score in enumerate(self.scores.tolist())}

    def reward(self, text: str) -> float:
        words = text.split()
        return sum(self.words.get(word, 0.0) for word in words) / max(1, len(words))

    def judge(self, prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> list[float]:
        return [1 / (1 + math.exp(self.reward(v) - self.reward(u))) for u, v in zip(a, b, strict=True)]


def write_model(work: Work, folder: Path) -> None:
    """A model folder as `transformers` writes it: random weights, and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from nlhf.llm.folders import quiet_in_a_pipe

    config = LlamaConfig(
        vocab_size=work.vocabulary,
        hidden_size=work.width,
        intermediate_size=3 * work.width,
        num_hidden_layers=work.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    quiet_in_a_pipe()
    torch.random.manual_seed(0)  # transformers draws initial weights from the global generator
    LlamaForCausalLM(config).save_pretrained(folder)
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    words = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(4, work.vocabulary))])}
    table = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    table.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=table, padding_side="left", **names).save_pretrained(folder)


def loss(work: Work, log_prob: Tensor, reference: Tensor, reward: Tensor) -> Tensor:
    """Of responses (B, n) and their rewards; DPO and IPO compare the first two, the MDs the first half to the rest."""
    if work.algorithm.endswith("PO") and work.algorithm != "GRPO":
        margin = (reward.diff(dim=-1).sign() * (log_prob - reference).diff(dim=-1)).squeeze(-1)
        ipo = work.algorithm.endswith("IPO")
        return ((margin - 0.5 / BETA) ** 2 if ipo else -F.logsigmoid(BETA * margin)).mean()
    if work.algorithm.endswith("MD"):
        mine, theirs = reward.chunk(2, -1)
        gain = (mine - theirs).sigmoid() - BETA * (log_prob.detach() - reference)
        return -((gain - 0.5) * log_prob).mean()
    gain = reward - BETA * (log_prob.detach() - reference)
    advantage = gain - gain.mean(-1, keepdim=True)
    return -(advantage / (gain.std(-1, keepdim=True) + 1e-4 if work.algorithm == "GRPO" else 1) * log_prob).mean()


def pairs(work: Work) -> Tensor:
    """(256, 2, T) offline responses."""
    return torch.stack([sentences(work, 256, work.tokens, seed)[0] for seed in (11, 12)], 1)


# Contestants


def ours(work: Work, model: Path, lap: Lap) -> None:
    from nlhf import MagneticMD, NashMD
    from nlhf.core import Geometric, Prox
    from nlhf.llm import CausalLM, ContrastiveSolver, JudgedGame, PolicyGradientSolver, Sample, TokenMixture

    (_, prompts), taste = sentences(work, 256, work.prompt, 0), Taste(work)
    reference = CausalLM.from_pretrained(model, max_new_tokens=work.tokens, lora_rank=None)
    reference.eos = None  # all responses are equally long
    generator, offline = torch.Generator().manual_seed(0), pairs(work)
    live = {name: p.clone().requires_grad_() for name, p in reference.params.items()}
    policy, optimizer = reference.with_params(live), torch.optim.AdamW(live.values(), lr=RATE, fused=True)
    game, sampled = JudgedGame(taste.judge, prompts, policy.text), Sample(1, None, False, work.prompts, held=0)
    pair = Sample(2, None, False, work.prompts, held=0)
    options: Any = {"steps": 1, "optimizer": partial(torch.optim.AdamW, lr=RATE, fused=True)}
    ascend, contrast = PolicyGradientSolver(game, sampled, **options), ContrastiveSolver(game, pair, **options)
    algorithm = NashMD(5.0, BETA) if work.algorithm == "Nash-MD" else MagneticMD(5.0, BETA)
    state, fitted = algorithm.init(reference), reference
    mixture = TokenMixture(((policy, 0.5), (reference, 0.5)))
    for step, rows in enumerate(batches(work)):
        x = [prompts[i] for i in rows]
        if work.algorithm.endswith("MD"):
            state, _ = algorithm.step(state, partial(ascend, seed=step))
        elif work.algorithm == "online IPO":
            fitted, _ = contrast(Prox(Geometric(((reference, 1.0),)), fitted, 1 / BETA), fitted, seed=step)
        elif work.algorithm in ("sampling", "mixture"):
            (mixture if work.algorithm == "mixture" else policy).sample(x, 1, generator)
        else:
            online = work.algorithm not in ("DPO", "IPO")
            y = policy.sample(x, GROUPS.get(work.algorithm, 2), generator)[0] if online else offline[rows]
            reward = torch.tensor([[taste.reward(text) for text in row] for row in policy.text(y)])
            anchored = work.algorithm != "GRPO"
            with torch.no_grad():
                anchor = reference.log_prob(x, y) if anchored else None
            log_prob = policy.log_prob(x, y)
            loss(work, log_prob, log_prob.detach() if anchor is None else anchor, reward).backward()
            optimizer.step()
            optimizer.zero_grad()
        lap()


class Plain:
    """The same network in plain torch: fused matrices, a static cache, every prompt once for all its responses."""

    def __init__(self, network: Any, room: int, trained: bool) -> None:
        config, model = network.config, network.model
        self.heads, self.eps, self.params = config.num_attention_heads, config.rms_norm_eps, list[Tensor]()

        def own(*parts: Tensor) -> Tensor:
            self.params.append(torch.cat([part.detach() for part in parts]).requires_grad_(trained))
            return self.params[-1]

        self.embedding, self.last, self.layers = own(model.embed_tokens.weight), own(model.norm.weight), list[Any]()
        for layer in model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            mixing = own(attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
            wide, norms = own(mlp.gate_proj.weight, mlp.up_proj.weight), (layer.input_layernorm.weight,)
            first, second = map(own, (*norms, layer.post_attention_layernorm.weight))
            self.layers.append((first, mixing, own(attention.o_proj.weight), second, wide, own(mlp.down_proj.weight)))
        angle = torch.outer(torch.arange(room).float(), model.rotary_emb.inv_freq)
        angle = torch.cat([angle, angle], -1)
        self.cos, self.sin = angle.cos(), angle.sin()

    def block(self, i: int, x: Tensor, at: slice, attend: Callable[..., Tensor]) -> Tensor:
        first, mixing, out, second, wide, down = self.layers[i]
        y = F.linear(F.rms_norm(x, first.shape, first, self.eps), mixing)
        q, k, v = y.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        cos, sin = self.cos[at], self.sin[at]
        q, k = (t * cos + torch.cat([-t.chunk(2, -1)[1], t.chunk(2, -1)[0]], -1) * sin for t in (q, k))
        x = x + F.linear(attend(i, q, k, v).transpose(1, 2).flatten(2), out)
        gate, up = F.linear(F.rms_norm(x, second.shape, second, self.eps), wide).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, down)

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(F.rms_norm(x, self.last.shape, self.last, self.eps), self.embedding)

    def log_prob(self, prompts: Tensor, y: Tensor) -> Tensor:
        """(B, n) of responses y (B, n, T)."""
        (_, L), (B, n, T), kept = prompts.shape, y.shape, list[Tensor]()
        mask = torch.ones(T - 1, L + T - 1, dtype=torch.bool).tril(L)

        def read(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            kept[:] = k.repeat_interleave(n, 0), v.repeat_interleave(n, 0)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        def answer(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = torch.cat([kept[0], k], 2), torch.cat([kept[1], v], 2)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        x, z = F.embedding(prompts, self.embedding), F.embedding(y.flatten(0, 1)[:, :-1], self.embedding)
        for i in range(len(self.layers)):
            x = self.block(i, x, slice(L), read)
            z = self.block(i, z, slice(L, L + T - 1), answer)
        logits = self.logits(torch.cat([x[:, -1:].repeat_interleave(n, 0), z], 1)).view(B, n, T, -1)
        return (logits.gather(-1, y[..., None]).squeeze(-1) - logits.logsumexp(-1)).sum(-1)

    def start(self, prompts: Tensor, n: int) -> tuple[Tensor, Tensor]:
        (B, L), width = prompts.shape, self.cos.shape[1]
        cache = torch.empty(len(self.layers), 2, B * n, self.heads, len(self.cos), width)

        def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache[i, 0, :, :, :L], cache[i, 1, :, :, :L] = k.repeat_interleave(n, 0), v.repeat_interleave(n, 0)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        x = F.embedding(prompts, self.embedding)
        for i in range(len(self.layers)):
            x = self.block(i, x, slice(L), attend)
        return self.logits(x[:, -1]).repeat_interleave(n, 0), cache

    def extend(self, tokens: Tensor, cache: Tensor, used: int) -> Tensor:
        def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache[i, 0, :, :, used], cache[i, 1, :, :, used] = k[:, :, 0], v[:, :, 0]
            return F.scaled_dot_product_attention(q, cache[i, 0, :, :, : used + 1], cache[i, 1, :, :, : used + 1])

        x = F.embedding(tokens[:, None], self.embedding)
        for i in range(len(self.layers)):
            x = self.block(i, x, slice(used, used + 1), attend)
        return self.logits(x[:, 0])

    @torch.no_grad()
    def sample(self, prompts: Tensor, n: int, tokens: int, mixed: Plain | None = None) -> Tensor:
        """(B, n, T) responses; of each prompt the second half from the even mixture with another network."""
        logits, cache = self.start(prompts, n)
        others, memory = mixed.start(prompts, n // 2) if mixed else (logits, cache)
        drawn = list[Tensor]()
        for used in range(prompts.shape[1], prompts.shape[1] + tokens):
            if mixed:
                logits = logits.view(len(prompts), n, -1)
                logits[:, n // 2 :].lerp_(others.view(len(prompts), n // 2, -1), 0.5)
            cdf = logits.flatten(0, -2).softmax(-1).cumsum(-1)
            drawn.append(torch.searchsorted(cdf, torch.rand(len(cdf), 1) * cdf[:, -1:])[:, 0])
            if len(drawn) < tokens:
                logits = self.extend(drawn[-1], cache, used)
                if mixed:
                    others = mixed.extend(drawn[-1].view(-1, n)[:, n // 2 :].flatten(), memory, used)
        return torch.stack(drawn, -1).view(len(prompts), n, tokens)


def floor(work: Work, model: Path, lap: Lap) -> None:
    from transformers import LlamaForCausalLM

    network = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    (prompts, _), scores = sentences(work, 256, work.prompt, 0), Taste(work).scores
    policy, reference = (Plain(network, work.prompt + work.tokens, trained) for trained in (True, False))
    optimizer, offline = torch.optim.AdamW(policy.params, lr=RATE, fused=True), pairs(work)
    for rows in batches(work):
        x = prompts[rows]
        if work.algorithm in ("DPO", "IPO"):
            y = offline[rows]
        else:
            mixed = reference if work.algorithm == "Nash-MD" else None
            y = policy.sample(x, GROUPS.get(work.algorithm, 2), work.tokens, mixed)
        reward, y = scores[y].mean(-1), y[:, :1] if work.algorithm.endswith("MD") else y
        log_prob, anchor = policy.log_prob(x, y), None
        if work.algorithm != "GRPO":
            with torch.no_grad():
                anchor = reference.log_prob(x, y)
        loss(work, log_prob, log_prob.detach() if anchor is None else anchor, reward).backward()
        optimizer.step()
        optimizer.zero_grad()
        lap()


def trl(work: Work, model: Path, lap: Lap) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    class Laps(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            lap()

    taste, tokenizer = Taste(work), AutoTokenizer.from_pretrained(model)
    with tempfile.TemporaryDirectory() as folder:
        load = partial(AutoModelForCausalLM.from_pretrained, model, dtype=torch.float32)
        shared: dict[str, Any] = {"per_device_train_batch_size": work.batch, "learning_rate": RATE, "max_steps": 10**6}
        shared |= {"output_dir": folder, "report_to": [], "save_strategy": "no", "bf16": False, "use_cpu": True}
        shared |= {"gradient_checkpointing": False, "disable_tqdm": True, "lr_scheduler_type": "constant"}
        exact = {"min_new_tokens": work.tokens}
        rows: dict[str, list[str]] = {"prompt": sentences(work, 256, work.prompt, 0)[1]}
        given: dict[str, Any] = {"processing_class": tokenizer, "callbacks": [Laps()], "model": load()}

        def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
            return [taste.reward(text) for text in completions]

        if work.algorithm.endswith("MD"):
            kind = "experimental.nash_md.NashMD"
            shared |= {"max_new_tokens": work.tokens, "max_length": 256, "temperature": 1.0, "beta": [BETA]}
            shared |= {"mixture_coef": [0.5], "generation_kwargs": {**exact, "use_cache": False}}
            given |= {"ref_model": load(), "reward_funcs": reward_model(taste)}
        elif work.algorithm.startswith("online"):
            kind = "experimental.online_dpo.OnlineDPO"
            shared |= {"max_new_tokens": work.tokens, "max_length": 256, "temperature": 1.0, "beta": [BETA]}
            shared |= {"loss_type": "ipo" if work.algorithm.endswith("IPO") else "sigmoid", "generation_kwargs": exact}
            given |= {"ref_model": load(), "reward_funcs": reward}
        elif work.algorithm in GROUPS:
            kind = work.algorithm
            shared |= {"num_generations": GROUPS[kind], "max_completion_length": work.tokens, "temperature": 1.0}
            shared |= {"generation_kwargs": exact}
            given |= {"reward_funcs": reward}
        else:
            kind = "DPO"
            shared |= {"loss_type": ["ipo" if work.algorithm == "IPO" else "sigmoid"], "beta": BETA, "max_length": 256}
            both = [sentences(work, 256, work.tokens, seed)[1] for seed in (11, 12)]
            ranked = [sorted(pair, key=taste.reward, reverse=True) for pair in zip(*both, strict=True)]
            rows |= {"chosen": [f" {one}" for one, _ in ranked], "rejected": [f" {two}" for _, two in ranked]}
        module, _, name = f"trl.{kind}".rpartition(".")
        config, trainer = (getattr(import_module(module), name + part) for part in ("Config", "Trainer"))
        trainer(args=config(**shared), train_dataset=Dataset.from_dict(rows), **given).train()


def reward_model(taste: Taste) -> Any:
    """The reward as the network that Nash-MD asks for, at almost no cost."""
    from types import SimpleNamespace

    from transformers import PretrainedConfig

    class Base(torch.nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SimpleNamespace:
            mean = (taste.scores[input_ids] * attention_mask).cumsum(1) / attention_mask.cumsum(1).clamp(min=1)
            return SimpleNamespace(hidden_states=(mean[..., None],), last_hidden_state=mean[..., None])

    model: Any = torch.nn.Module()
    model.base_model_prefix, model.model, model.score = "model", Base(), torch.nn.Identity()
    model.config = PretrainedConfig(name_or_path="taste")  # type: ignore[call-arg]
    return model


CONTESTANTS: dict[str, Contestant] = {"ours": ours, "floor": floor, "trl": trl}


# Turns


class Stop(Exception):
    pass


class Turns:
    """Times the steps of a worker, which waits at the end of each turn until it is called again."""

    def __init__(self, pipe: TextIO) -> None:
        self.pipe, self.end, self.steps, self.last = pipe, 0.0, list[tuple[float, float]](), self.now()

    def send(self, **message: Any) -> None:
        print(json.dumps(message), file=self.pipe, flush=True)

    def lap(self) -> None:
        now, own, busy = self.now()
        if not self.end:
            self.send(version=version("trl") if "trl" in sys.modules else "")
        else:
            seconds = now - self.last[0]
            others = (busy - self.last[2] - (own - self.last[1])) / seconds
            # a tick is 10 ms: short steps are given that much slack
            self.steps.append((seconds, others - 0.03 / seconds))
            if now < self.end or len(self.steps) < 3:
                self.last = self.now()
                return
            self.send(steps=self.steps[1:])
        turn = sys.stdin.readline()
        if not turn:
            raise Stop
        self.steps = []
        self.last = self.now()
        self.end = self.last[0] + float(turn)

    @staticmethod
    def now() -> tuple[float, float, float]:
        """Seconds on the wall, of CPU by this process, and of CPU by all."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        ticks = list(map(int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9]))
        busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
        return perf_counter(), used.ru_utime + used.ru_stime, busy


def worker(contestant: str, work: Work, model: Path, threads: int) -> None:
    turns = Turns(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)  # what the contestant prints
    torch.set_num_threads(threads)
    try:
        CONTESTANTS[contestant](work, model, turns.lap)
    except Stop:
        status = Path("/proc/self/status").read_text()
        turns.send(megabytes=int(status.split("VmHWM:")[1].split()[0]) / 1024)
    except ImportError as error:
        turns.send(note=f"missing: {error}"[:60])
    except Exception as error:  # whatever a contestant raises is its result
        turns.send(note=" ".join(f"{type(error).__name__}: {error}".split())[:60])


class Run(NamedTuple):
    """What a contestant took: NaN where it did not run."""

    step: float = math.nan
    """Seconds, the median."""
    cold: float = math.nan
    """Seconds from the start of the process to the end of its first step."""
    megabytes: float = math.nan
    clean: int = 0
    steps: int = 0
    version: str = ""
    note: str = ""


class Racer:
    def __init__(self, contestant: str, work: Work, model: Path, path: Path | None, threads: int) -> None:
        where = [str(path.resolve())] if path else []
        paths = os.pathsep.join([*where, *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, __file__, "--worker", json.dumps([contestant, work, str(model), threads])]
        self.steps: list[tuple[float, float]] = []
        start = perf_counter()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths},
        )
        first = self.receive()
        self.run = Run(cold=perf_counter() - start, version=first.get("version", ""), note=first.get("note", ""))

    def receive(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"note": "crashed"}

    def turn(self, seconds: float) -> list[tuple[float, float]]:
        if self.run.note:
            return []
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            print(seconds, file=self.process.stdin, flush=True)
        answer = self.receive()
        self.run = self.run._replace(note=answer.get("note", ""))
        return [(one, two) for one, two in answer.get("steps", [])]

    def finish(self) -> Run:
        self.process.stdin.close()  # type: ignore[union-attr]
        end = {} if self.run.note else self.receive()
        self.process.kill()
        self.process.wait()
        clean = [seconds for seconds, others in self.steps if others <= 0.15]
        taken = clean if len(clean) >= 5 else [seconds for seconds, _ in self.steps]
        if self.run.note or not taken:
            return Run(note=self.run.note or "no steps")
        return self.run._replace(
            step=median(taken), megabytes=end.get("megabytes", math.nan), clean=len(clean), steps=len(self.steps)
        )


class Race(NamedTuple):
    """How the contestants are called."""

    sizes: dict[str, int]
    model: Path
    rounds: int
    seconds: float
    threads: int
    trl: Path | None
    nash: Path | None

    def __call__(self, *entries: tuple[str, str, int]) -> list[Run]:
        """Runs of (contestant, algorithm, tokens), by turns."""
        racers = [
            Racer(one, Work(algorithm, tokens, **self.sizes), self.model, self._path(one, algorithm), self.threads)
            for one, algorithm, tokens in entries
        ]
        for turn in range(self.rounds + 1):
            for racer in racers:
                steps = racer.turn(self.seconds if turn else self.seconds / 2)
                racer.steps += steps if turn else []  # the first turn warms up
        return [racer.finish() for racer in racers]

    def _path(self, contestant: str, algorithm: str) -> Path | None:
        return (self.nash if algorithm.endswith("MD") else self.trl) if contestant == "trl" else None


class Table:
    """Rows as they come. `judge`: whether the sizes are those that the targets are for."""

    def __init__(self, judge: bool) -> None:
        self.judge, self.numbers, self.texts = judge, list[dict[str, Any]](), [list(WIDTHS)]
        self.print(self.texts[0])

    def add(
        self, work: str, us: Run, peer: str, them: Run, target: float | None, unit: str = "x", value: float = 0.0
    ) -> None:
        """The ratio in "x" is them / us and should be at least the target; otherwise us / them, or `value`, at most."""
        from race_games import short, time

        faster, target = unit == "x", target if self.judge else None
        value = value or (them.step / us.step if faster else us.step / them.step)
        known = target is not None and not math.isnan(value)
        met = ("yes" if (value >= target) == faster else "no") if target is not None and known else ""
        ratio = us.note or them.note or ("–" if math.isnan(value) else f"{short(value)}{' ' * (not faster)}{unit}")
        wanted = "" if target is None else f"{'>=' if faster else '<='} {target:g}"
        memory = " / ".join("–" if math.isnan(one.megabytes) else f"{one.megabytes:.0f}" for one in (us, them))
        self.texts.append([work, time(us.step), peer, time(them.step), ratio, wanted, met, memory])
        row = {"work": work, "peer": peer, "ratio": value, "unit": unit, "target": target, "met": met}
        sides = {f"{side}_{k}": v for side, one in (("our", us), ("peer", them)) for k, v in one._asdict().items()}
        self.numbers.append(row | sides)
        self.print(self.texts[-1])

    @staticmethod
    def print(cells: Sequence[str]) -> None:
        pieces = (cell.ljust(width) for cell, width in zip(cells, WIDTHS.values(), strict=True))
        print("  ".join(pieces).rstrip(), flush=True)

    def write(self, out: Path, about: str) -> None:
        import pandas as pd

        from nlhf.run import write_atomically

        out.mkdir(parents=True, exist_ok=True)
        head, *body = ("| " + " | ".join(cells) + " |" for cells in self.texts)
        text = "\n".join([about, "", head, "|---" * len(WIDTHS) + "|", *body, ""])
        for path, content in (("table.csv", pd.DataFrame(self.numbers).to_csv(index=False)), ("table.md", text)):
            write_atomically(out / path, content.encode())
            print(f"wrote {out / path}")


def training(table: Table, race: Race, tokens: int, targets: dict[str, float]) -> list[tuple[Run, Run]]:
    """Rows of some algorithms, which race together; returns our runs and TRL's. TRL runs once for the two MDs."""
    peers = [name for name in targets if name != "magnetic MD"]
    entries = [(one, name, tokens) for name in targets for one in ("ours", "floor")]
    runs = race(*entries, *(("trl", name, tokens) for name in peers))
    theirs = dict(zip(peers, runs[len(entries) :], strict=True))
    ran = []
    for i, (name, target) in enumerate(targets.items()):
        us, plain, them = runs[2 * i], runs[2 * i + 1], theirs[name if name in theirs else "Nash-MD"]
        work, label = f"{name}, {tokens} tokens", " ".join(["TRL", them.version, *(["Nash-MD"] * name.endswith("MD"))])
        table.add(work, us, label, them, target)
        table.add(work, us, "plain torch loop", plain, 1.25, "loops")
        ran.append((us, them))
    return ran


def summary(table: Table, runs: Sequence[tuple[Run, Run]]) -> None:
    """Cold start and memory, over all rows of TRL."""
    us, them = ([pair[side] for pair in runs if pair[side].step > 0] for side in (0, 1))
    cold = [Run(median(run.cold for run in side)) if side else Run(note="did not run") for side in (us, them)]
    table.add("cold start to first step", cold[0], "", Run(), 4, "s", cold[0].step)
    table.add("cold start to first step", cold[0], "TRL", cold[1], None)
    most = max((one.megabytes / two.megabytes for one, two in runs if two.step > 0), default=math.nan)
    table.add("peak memory, worst row", Run(), "TRL", Run(), 1, "of TRL's", most)


def scaling(table: Table, race: Race, tokens: int) -> None:
    """Doubling the length, and mixing with the reference."""
    short, *longer, mixed = race(
        *(("ours", "sampling", length) for length in (tokens, 2 * tokens, 4 * tokens)), ("ours", "mixture", tokens)
    )
    for factor, run in zip((2, 4), longer, strict=True):
        half = short if factor == 2 else longer[0]
        label = f"sampling {factor * tokens} tokens"
        table.add(label, run, f"{factor * tokens // 2} tokens", half, 2, "per token", run.step / half.step / 2)
    table.add(f"mixture, {tokens} tokens", mixed, "sampling", short, 2.2, "samples")


def main(
    quick: bool = False,
    out: Path | None = None,
    trl: Path | None = None,
    trl_nash: Path | None = None,
    threads: int = 2,
) -> None:
    """Race training steps against TRL and a plain torch loop.

    Args:
        quick: small sizes, to see that everything runs; no target is judged.
        out: folder to write the table in; by default it is only printed.
        trl: folder with the current TRL (pip install --target); by default what is installed.
        trl_nash: folder with TRL 1.13.0 or another that has Nash-MD; by default what is installed.
        threads: of torch.
    """
    from race_games import machine, name

    from nlhf.run import check_folder

    if out is not None:
        check_folder(out)
    sizes = {"layers": 2, "width": 32, "vocabulary": 100, "batch": 16, "prompt": 8} if quick else {}
    work = Work("", 0, **sizes)
    shown = ", ".join(f"{k} {v}" for k, v in work._asdict().items() if v)
    packages = ", ".join(name(one) for one in ("torch", "transformers", "accelerate"))
    about = f"{machine()}\n{packages}, {threads} threads\n{shown}"
    print(about, end="\n\n")
    table, mirror = Table(judge=not quick), ("Nash-MD", "magnetic MD")
    with tempfile.TemporaryDirectory() as folder:
        write_model(work, Path(folder))
        race = Race(sizes, Path(folder), 1 if quick else 12, 0.2 if quick else 0.8, threads, trl, trl_nash)
        runs = training(table, race, 16, dict.fromkeys(mirror, 4.0))
        runs += training(table, race, 48, dict.fromkeys(mirror, 7.0))
        runs += training(table, race, 16, {"online DPO": 1.3, "online IPO": 1.3})
        runs += training(table, race, 16, {"GRPO": 1.6, "RLOO": 2.0})
        runs += training(table, race, 16, {"DPO": 1.2, "IPO": 1.2})
        summary(table, runs)
        scaling(table, race, 16)
    if out is not None:
        table.write(out, about)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        contestant, sizes, folder, cores = json.loads(sys.argv[2])
        worker(contestant, Work(*sizes), Path(folder), cores)
    else:
        import tyro

        try:
            tyro.cli(main)
        except (ValueError, OSError) as error:
            sys.exit(f"race_trl: {error}")
