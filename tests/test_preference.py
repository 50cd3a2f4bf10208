"""Preferences that are learned, mixed and remembered: data, judges, their fit and its calibration, the command."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit
from scipy.stats import binomtest

from nlhf import cli
from nlhf.calibration import calibration
from nlhf.llm import Annotators, BradleyTerry, Cached, CausalLM, JudgedGame, PreferenceModel, fit_preference
from nlhf.llm import fit as fit_module
from nlhf.llm.causal_lm import prompt_tokens
from nlhf.llm.data import Comparison, Message, read_comparisons, read_prompts
from nlhf.llm.preference import cycle_judge
from nlhf.llm.preference_model import LearnedJudge
from nlhf.tabular.tournament import bradley_terry_scores
from tests.checks import assert_close

transformers = pytest.importorskip("transformers", reason="the llm extra is not installed")
pytest.importorskip("peft", reason="the llm extra is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

fitting: Any = fit_module
KINDS = [PreferenceModel, BradleyTerry]
FLOAT32 = 2e-6  # a score of order 1 in float32, along two shapes of batch
NAMES = ["rock", "paper", "scissors", "a well"]
LOGITS = np.array([[0, 1.5, -1.0, 0.5], [-1.5, 0, 2.0, 0.3], [1.0, -2.0, 0, -0.7], [-0.5, -0.3, 0.7, 0]])
CHAT = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "


def small(kind: Any, seed: int = 0) -> Any:
    """A judge with opinions: its head is drawn at random, too."""
    judge = kind.from_scratch(width=16, layers=1, heads=2, length=24, seed=seed)
    head = torch.randn(16, generator=torch.Generator().manual_seed(seed))
    return judge.with_params({**judge.params, "head": head})


def questions(prompts: int = 2, names: list[str] = NAMES) -> tuple[Any, Any, Any]:
    asked = [(f"Which? {x}", a, b) for x in range(prompts) for a, b in permutations(names, 2)]
    return tuple(zip(*asked, strict=True))  # type: ignore[return-value]


def rows(prompts: int = 8) -> list[Comparison]:
    """Twelve pairs on each prompt, of one intransitive taste, of many lengths."""
    places = range(len(NAMES))
    return [
        Comparison(f"Which{'?' * x}", NAMES[i], NAMES[j], float(expit(LOGITS[i, j])))
        for x in range(prompts)
        for i, j in permutations(places, 2)
    ]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random causal model over bytes with a chat template, saved as any Hugging Face model is."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = small(BradleyTerry).tokenizer
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(path)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, eos_token_id=256, max_position_embeddings=256, initializer_range=0.6,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.random.manual_seed(0)  # transformers draws initial weights from the global generator
        transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


# --- learned judges ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_antisymmetric_to_the_last_bit(kind: Any) -> None:
    judge, (x, a, b) = small(kind), questions()
    one, other = judge(x, a, b), judge(x, b, a)
    assert np.abs(one - 0.5).max() > 0.05
    np.testing.assert_array_equal(one + other, 1.0)
    np.testing.assert_array_equal(judge(x, a, a), 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_judged_game_asks_an_antisymmetric_judge_once(kind: Any) -> None:
    calls = []

    def counted(*asked: Any) -> Any:
        calls.append(len(asked[0]))
        return small(kind)(*asked)

    judge = type("Judge", (), {"antisymmetric": True, "__call__": lambda self, *asked: counted(*asked)})()
    game = JudgedGame(judge, ["Which?"], text=lambda y: y)
    p = game.win_prob(game.prompts, [NAMES], [NAMES])
    assert calls == [16]
    np.testing.assert_array_equal(p + np.swapaxes(p, 1, 2), 1.0)
    both = JudgedGame(lambda *asked: counted(*asked), ["Which?"], text=lambda y: y)
    assert_close(both.win_prob(game.prompts, [NAMES], [NAMES]), p, atol=1e-15)
    assert calls == [16, 16, 16]


@pytest.mark.parametrize("kind", KINDS)
def test_neither_padding_nor_company_matters(kind: Any) -> None:
    judge, (x, a, b) = small(kind), questions()
    alone = [judge([prompt], [one], [other])[0] for prompt, one, other in zip(x, a, b, strict=True)]
    assert_close(judge(x, a, b), alone, atol=FLOAT32)


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_by_hand(kind: Any) -> None:
    """Tokens written out, no batch, no padding; every distinct input is read once."""
    judge, read = small(kind), []
    score = judge._score

    def spelled(*texts: str) -> float:
        tokens = [*judge.tokenizer(texts[0])["input_ids"]]
        for text in texts[1:]:
            tokens += [*judge.tokenizer(text)["input_ids"], 256]
        network = judge.with_params(judge.params).network
        hidden = network.backbone(torch.tensor([tokens])).last_hidden_state[0, -1]
        return float((hidden @ judge.params["head"]).detach())

    def f(a: str, b: str) -> float:
        return spelled("Which?", a) if kind is BradleyTerry else spelled("Which?", a, b)

    judge._score = lambda inputs: read.extend(inputs) or score(inputs)  # type: ignore[func-returns-value]
    pairs = list(permutations(NAMES, 2))
    p = judge(["Which?"] * len(pairs), *zip(*pairs, strict=True))
    assert_close(p, [expit(f(a, b) - f(b, a)) for a, b in pairs], atol=FLOAT32)
    assert len(read) == (4 if kind is BradleyTerry else 12)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_read_with_others_of_their_length_whoever_is_a(kind: Any) -> None:
    """In one order, whatever that of the questions or of Python's sets: rounding depends on the batch."""
    judge, (x, a, b), read = small(kind), questions(8), []
    score = judge._score
    judge._score = lambda inputs: read.append(inputs) or score(inputs)  # type: ignore[func-returns-value]
    one = judge(x, a, b)
    first, read = read, []
    np.testing.assert_array_equal(judge(x[::-1], b[::-1], a[::-1])[::-1] + one, 1.0)
    assert read == first
    assert len(first) == (1 if kind is BradleyTerry else 3)
    lengths = [len(tokens) for batch in first for tokens in batch]
    assert lengths == sorted(lengths)


def test_a_response_cannot_forge_the_end_of_itself() -> None:
    judge = small(PreferenceModel)
    (tokens,) = judge._tokens({("x", "a<end>b", "c")}).values()
    assert tokens.count(256) == 2
    assert tokens[-1] == 256


def test_long_texts_are_cut_and_counted() -> None:
    judge = small(BradleyTerry)
    long, longer = "a" * 24, "a" * 25
    (tokens,) = judge._tokens({("b" * 30 + "c", longer)}).values()
    assert judge.tokenizer.decode(tokens) == "b" * 23 + "c" + long + "<end>"
    assert judge.cut([Comparison("x", long, "b", 1.0), Comparison("x", "b", longer, 1.0)]) == 1
    with pytest.raises(ValueError, match="length must leave room for 302 tokens in 75 positions, got 100"):
        PreferenceModel(judge.network, judge.tokenizer, judge.params, 100)


def test_every_token_is_learned() -> None:
    judge = small(PreferenceModel)
    params = {name: p.clone().requires_grad_() for name, p in judge.params.items()}
    fitting._loss(judge.with_params(params), rows(1)).backward()
    read = {token for tokens in judge._tokens({("Which", NAMES[0], NAMES[1])}).values() for token in tokens}
    assert 256 in read
    for token in read:
        assert (params["backbone.embed_tokens.weight"].grad[token] != 0).any()
    assert all((p.grad != 0).any() for p in params.values())


# --- fitting -----------------------------------------------------------------------------------------------------


def listed(kind: Any) -> tuple[Any, Any]:
    """(n, n) fitted probabilities of a game whose soft labels are all listed, and the game's."""
    p = expit(LOGITS)
    data = [Comparison("Which?", NAMES[i], NAMES[j], float(p[i, j])) for i in range(4) for j in range(i)]
    start = kind.from_scratch(width=16, layers=1, heads=2, length=16)
    judge = fit_preference(start, data, 0, epochs=150, lr=1e-2, batch=6).model
    i, j = np.indices((4, 4)).reshape(2, -1)
    return judge(["Which?"] * 16, [NAMES[k] for k in i], [NAMES[k] for k in j]).reshape(4, 4), p


def test_a_preference_model_learns_an_intransitive_game() -> None:
    """rock beats paper beats scissors beats rock; 150 steps of Adam end about 1e-4 from the labels."""
    fitted, p = listed(PreferenceModel)
    assert p[0, 1] > 0.5 < p[1, 2]
    assert p[2, 0] > 0.5
    assert_close(fitted, p, atol=1e-3)


def test_bradley_terry_learns_its_own_maximum_of_likelihood_and_no_more() -> None:
    fitted, p = listed(BradleyTerry)
    scores = bradley_terry_scores(p)
    best = expit(scores[:, None] - scores)
    assert_close(fitted, best, atol=1e-3)
    assert np.abs(best - p).max() > 0.3


def test_the_loss_by_hand() -> None:
    judge, data = small(PreferenceModel), rows(1)
    x, a, b, p = (list(column) for column in zip(*data, strict=True))
    q = judge(x, a, b)
    by_hand = np.mean([-t * np.log(s) - (1 - t) * np.log(1 - s) for s, t in zip(q, p, strict=True)])
    assert_close(fitting._loss(judge, data).detach(), by_hand, atol=FLOAT32)


def test_no_prompt_is_both_learned_from_and_measured_on() -> None:
    data = rows(8)
    train, held = fitting.split(data, 0.25, seed=1)
    assert len({c.prompt for c in held}) == 2
    assert not {c.prompt for c in held} & {c.prompt for c in train}
    assert sorted(train + held) == sorted(data)
    assert fitting.split(data, 0.25, seed=1) == (train, held) != fitting.split(data, 0.25, seed=2)
    assert fitting.split(data, 0, seed=1) == (data, [])


def test_every_epoch_reads_every_comparison_once_in_batches_of_a_length() -> None:
    data = rows(8)
    batches = list(fitting._batches(data, 10, 0, 2, 0))
    assert [len(batch) for batch in batches].count(10) == 18  # and 6 are left over, twice
    for epoch in (batches[:10], batches[10:]):
        assert sorted(row for batch in epoch for row in batch) == sorted(data)
    assert batches[:10] != batches[10:]
    assert list(fitting._batches(data, 10, 0, 2, 13)) == batches[13:]
    lengths = [[len(c.prompt) + len(c.a) + len(c.b) for c in batch] for batch in batches]
    assert np.mean([np.ptp(batch) for batch in lengths]) < 0.5 * np.ptp([n for batch in lengths for n in batch])


RECIPE: Any = {"epochs": 2, "lr": 1e-2, "batch": 16, "seed": 3}


def interrupted(monkeypatch: pytest.MonkeyPatch, after: int, by: Callable[[], Any]) -> None:
    loss, calls = fitting._loss, iter(range(after))

    def limited(*args: Any) -> Any:
        return by() * loss(*args) if next(calls, None) is None else loss(*args)

    monkeypatch.setattr(fitting, "_loss", limited)


def test_a_run_resumes_to_the_last_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = small(PreferenceModel)
    before = {name: p.clone() for name, p in start.params.items()}
    whole = fit_preference(start, rows(), 0.25, **RECIPE)

    def stop() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        interrupted(patch, 7, stop)
        with pytest.raises(KeyboardInterrupt):
            fit_preference(start, rows(), 0.25, **RECIPE, checkpoint=tmp_path, every=3)
    resumed = fit_preference(start, rows(), 0.25, **RECIPE, checkpoint=tmp_path, every=5)
    with monkeypatch.context() as patch:
        interrupted(patch, 0, stop)
        again = fit_preference(start, rows(), 0.25, **RECIPE, checkpoint=tmp_path)  # there is nothing left to do
    for fit in (resumed, again):
        assert fit.records == whole.records
        assert fit.calibration is not None
        assert fit.calibration.metrics == whole.calibration.metrics  # type: ignore[union-attr]
        assert all(torch.equal(fit.model.params[name], p) for name, p in whole.model.params.items())
    written = [tuple(json.loads(line).values()) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == list(whole.records)
    assert {name for _, name, _ in written} >= {"loss", "held_out_accuracy", "held_out_ece"}
    assert all(torch.equal(start.params[name], p) for name, p in before.items())
    with pytest.raises(ValueError, match=r"is of another run: it has \{'lr': 0.01\}, this one \{'lr': 0.1\}"):
        fit_preference(start, rows(), 0.25, **{**RECIPE, "lr": 0.1}, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"is of another run: it has \{'judge': 'PreferenceModel"):
        fit_preference(small(BradleyTerry), rows(), 0.25, **RECIPE, checkpoint=tmp_path)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = small(PreferenceModel)
    seen = {}
    save = PreferenceModel.save

    def watched(self: Any, *args: Any, **more: Any) -> None:
        seen.update({name: p.detach().clone() for name, p in self.params.items()})
        save(self, *args, **more)

    monkeypatch.setattr(PreferenceModel, "save", watched)
    interrupted(monkeypatch, 5, lambda: float("nan"))
    with pytest.raises(FloatingPointError, match=r"loss nan, gradient nan at step 5: lower lr = 0.01; .* holds the la"):
        fit_preference(start, rows(), 0, **RECIPE, checkpoint=tmp_path, every=2)
    kept = PreferenceModel.load(tmp_path)
    assert all(torch.equal(kept.params[name], p) for name, p in seen.items())
    assert not torch.equal(kept.params["head"], start.params["head"])
    assert np.isfinite(kept(*questions())).all()
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3]  # the checkpoint of step 4, whose loss was still a number


def test_trouble_with_the_folder_comes_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "_loss", lambda *args: pytest.fail("work has begun"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        fit_preference(small(BradleyTerry), rows(), checkpoint=tmp_path / "file")
    usage = shutil.disk_usage(tmp_path)._replace(free=10**5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"checkpoint needs 0.2 MB in .*, where 0.1 MB are free"):
        fit_preference(small(BradleyTerry), rows(), checkpoint=tmp_path / "new")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epochs": 0}, "epochs must be an integer >= 1, got 0"),
        ({"batch": 2.5}, "batch must be an integer >= 1, got 2.5"),
        ({"lr": float("nan")}, "lr must be a finite number > 0, got nan"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"held_out": 1.0}, r"held_out must be a share in \[0, 1\), got 1.0"),
        ({"held_out": 0.99}, "held_out must leave prompts to learn from, got 0.99 of 8"),
        ({"comparisons": []}, "comparisons must be at least one, got none"),
    ],
)
def test_bad_arguments_of_a_fit(changed: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_preference(small(BradleyTerry), **{"comparisons": rows(), **changed})


# --- files of judges ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora_rank", [None, 2])
def test_what_is_saved_is_loaded_to_the_last_bit(
    kind: Any, lora_rank: int | None, folder: Path, tmp_path: Path
) -> None:
    start = kind.from_pretrained(folder, length=24, lora_rank=lora_rank, seed=1)
    np.testing.assert_array_equal(start(*questions()), 0.5)
    judge = fit_preference(start, rows(2), 0, lr=1e-2, epochs=3).model
    assert all((judge.params[name] != p).any() for name, p in start.params.items())
    judge.save(tmp_path)
    for loader in (kind, LearnedJudge):
        loaded = loader.load(tmp_path)
        assert type(loaded) is kind
        np.testing.assert_array_equal(loaded(*questions()), judge(*questions()))
    other = KINDS[1 - KINDS.index(kind)]
    with pytest.raises(ValueError, match=f"expected a {other.__name__}, got {kind.__name__}"):
        other.load(tmp_path)
    weights = tmp_path / "model.safetensors"
    assert {path.suffix for path in tmp_path.iterdir()} <= {".safetensors", ".json", ".jinja"}
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"model.safetensors: cannot be read"):
        kind.load(tmp_path)


def test_a_folder_of_something_else(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a LearnedJudge, got another kind of model"):
        LearnedJudge.load(folder)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        LearnedJudge.load(tmp_path)


# --- conversations -----------------------------------------------------------------------------------------------


def test_a_prompt_is_a_string_or_a_conversation(folder: Path) -> None:
    model = CausalLM.from_pretrained(folder, max_new_tokens=2)
    talk = (Message("system", "Be brief."), Message("user", "Hi!"))

    def written(prompt: Any) -> str:
        return model.tokenizer.decode(prompt_tokens(model.tokenizer, prompt))

    assert written("Hi!") == written((Message("user", "Hi!"),)) == "[user] Hi!\n[assistant] "
    assert written(talk) == "[system] Be brief.\n[user] Hi!\n[assistant] "
    _, mask = model.encode([talk, "Hi!"])
    assert mask.sum(-1).tolist() == [len(written(talk)), len(written("Hi!"))]
    judge = small(PreferenceModel)
    with pytest.raises(
        ValueError, match=r"prompt must be a string for a tokenizer without a chat template, got .*brief"
    ):
        judge([talk], ["a"], ["b"])
    judge.tokenizer.chat_template = CHAT
    assert judge([talk], ["a"], ["b"]) != judge(["Hi!"], ["a"], ["b"])


USER, YES, NO = (
    {"role": role, "content": text} for role, text in [("user", "Wet?"), ("assistant", "Yes."), ("assistant", "No.")]
)
SYSTEM = {"role": "system", "content": "Rhyme."}
EXPECTED = Comparison("Wet?", "Yes.", "No.", 1.0)
TALK = (Message("system", "Rhyme."), Message("user", "Wet?"))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Wet?", "chosen": "Yes.", "rejected": "No."}, EXPECTED),
        ({"prompt": [USER], "chosen": [YES], "rejected": [NO]}, EXPECTED),
        ({"chosen": [USER, YES], "rejected": [USER, NO]}, EXPECTED),
        ({"prompt": "the title", "chosen": [USER, YES], "rejected": [USER, NO], "score": 3}, EXPECTED),
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, ("The sky is", " blue.", " green.", 1)),
        ({"chosen": "ab", "rejected": "a"}, ("a", "b", "", 1)),
        ({"prompt": [SYSTEM, USER], "chosen": [YES], "rejected": [NO]}, (TALK, "Yes.", "No.", 1)),
        ({"chosen": [SYSTEM, USER, YES], "rejected": [SYSTEM, USER, NO]}, (TALK, "Yes.", "No.", 1)),
        ({"prompt": "Wet?", "response_a": "Yes.", "response_b": "No.", "p_a": 0.3}, ("Wet?", "Yes.", "No.", 0.3)),
        ({"prompt": [USER], "response_a": [YES], "response_b": "No.", "p_a": 1}, EXPECTED),
        ({"prompt": "Wet?", "response_a": "No.", "response_b": "No.", "p_a": 0.5}, ("Wet?", "No.", "No.", 0.5)),
    ],
)
def test_formats(row: dict[str, Any], expected: Any) -> None:
    assert read_comparisons([row]) == [expected]


def test_every_container_holds_the_same(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = [{"chosen": [SYSTEM, USER, YES], "rejected": [SYSTEM, USER, NO], "é": i} for i in range(3)]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in table).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    dataset = datasets.Dataset.from_list(table)
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.save_to_disk(tmp_path / "folder")
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "splits")
    expected = [(TALK, "Yes.", "No.", 1.0)] * 3
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet", "folder", "splits/train"):
        assert read_comparisons(tmp_path / name) == expected
    assert read_comparisons(dataset) == expected
    with pytest.raises(ValueError, match="splits: holds the splits train, give one of them"):
        read_comparisons(tmp_path / "splits")
    assert read_prompts([{"prompt": "Hi!"}, {"prompt": [SYSTEM, USER], "x": 1}]) == ["Hi!", TALK]


BOTH = {"prompt": "x", "chosen": "a", "rejected": "b", "response_a": "a", "response_b": "b", "p_a": 1}
SOFT = {"prompt": "x", "response_a": "a", "response_b": "b"}
HARD = {"prompt": "x", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "x", "chosen": "a"},
            "expected the columns .*prompt,. chosen, rejected or else .* got prompt, chosen",
        ),
        (BOTH, "expected the columns .* got prompt, chosen, rejected, response_a, response_b, p_a"),
        ([1, 2], r"expected an object with named columns, got \[1, 2\]"),
        ({**SOFT, "p_a": 1.5}, r"p_a must be a probability in \[0, 1\], got 1.5"),
        ({**SOFT, "p_a": True}, r"p_a must be a probability in \[0, 1\], got True"),
        ({**SOFT, "p_a": float("nan")}, r"p_a must be a probability in \[0, 1\], got nan"),
        ({**SOFT, "p_a": "1"}, r"p_a must be a probability in \[0, 1\], got '1'"),
        ({**HARD, "prompt": None}, "prompt must be a string or a list of at least one message, got None"),
        ({**HARD, "prompt": []}, r"prompt must be a string or a list of at least one message, got \[\]"),
        ({**HARD, "prompt": [YES]}, "prompt must end before the assistant speaks, its last message is .*Yes"),
        ({**HARD, "prompt": [{"role": "user"}]}, "a message of prompt must be {role, content}, two strings, got"),
        ({**HARD, "prompt": [{"from": "user", "value": "x"}]}, "a message of prompt must be {role, content}"),
        ({**HARD, "rejected": "a"}, "chosen and rejected must differ, a response ties with itself, got 'a'"),
        ({**HARD, "rejected": None}, "chosen and rejected must be two strings or two lists .* got 'a' and None"),
        ({**HARD, "rejected": [NO]}, "chosen and rejected must be two strings or two lists of messages"),
        ({"chosen": [YES], "rejected": [NO]}, "prompt must be a string or a list of at least one message"),
        ({"chosen": [USER, YES], "rejected": [USER, YES]}, "prompt must end before the assistant speaks"),
        (
            {"chosen": [USER, YES, USER], "rejected": [USER, NO]},
            "chosen must be a string or one message after the prom",
        ),
        (
            {"prompt": [USER], "chosen": [USER], "rejected": [NO]},
            "chosen must be a message of the assistant, got .*'user",
        ),
        ("{", "not JSON"),
        (b"\xff\xfe\xff", "not JSON"),
    ],
)
def test_malformed_rows_are_named(row: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    text = row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
    file.write_bytes(json.dumps(HARD).encode() + b"\n\n" + text + b"\n")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(file))}, line 3: {message}"):
        read_comparisons(file)


def test_bad_files_are_named(tmp_path: Path) -> None:
    for name, message in [
        ("a.jsonl.gz", "not a gzip file"),
        ("a.parquet", "not a Parquet file"),
        ("a.csv", "expected a .jsonl, .jsonl.gz or .parquet file, or a folder of Dataset.save_to_disk"),
        ("a.jsonl", "expected at least one row, got none"),
    ]:
        (tmp_path / name).write_text("" if name == "a.jsonl" else "prompt\n")
        with pytest.raises(ValueError, match=rf"{name}: {message}"):
            read_comparisons(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no such file or folder"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="data, row 1: expected the column prompt, got text"):
        read_prompts([{"prompt": "x"}, {"text": "x"}])


# --- judges of judges --------------------------------------------------------------------------------------------


def ranks(*order: str) -> Any:
    """A judge that prefers what comes first."""
    return lambda prompts, a, b: [
        0.5 + 0.4 * np.sign(order.index(t) - order.index(s)) for s, t in zip(a, b, strict=True)
    ]


def test_three_annotators_with_transitive_tastes_go_in_circles() -> None:
    voters = Annotators([ranks("a", "b", "c"), ranks("b", "c", "a"), ranks("c", "a", "b")])
    assert_close(voters(["x"] * 3, ["a", "b", "c"], ["b", "c", "a"]), (0.9 + 0.9 + 0.1) / 3, atol=1e-15)
    lone = Annotators([ranks("a", "b"), ranks("b", "a")], [0.25, 0.75])
    assert_close(lone(["x"], ["a"], ["b"]), 0.25 * 0.9 + 0.75 * 0.1, atol=1e-15)
    assert not voters.antisymmetric
    assert Annotators([small(PreferenceModel), small(BradleyTerry)]).antisymmetric
    assert not Annotators([small(PreferenceModel), cycle_judge]).antisymmetric


@pytest.mark.parametrize(
    ("judges", "weights", "message"),
    [
        ([], None, "judges must be at least one, got none"),
        ([cycle_judge], [0.5], r"weights must sum to 1, got \[0.5\], whose sum is 0.5"),
        ([cycle_judge], [0.5, 0.5], r"weights must be 1 numbers >= 0, one for each judge, got \[0.5, 0.5\]"),
        ([cycle_judge] * 2, [1.5, -0.5], "weights must be 2 numbers >= 0"),
    ],
)
def test_bad_annotators(judges: Any, weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Annotators(judges, weights)


class Counting:
    """A judge with answers that take all bits, which remembers its questions."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def __call__(self, prompts: Any, a: Any, b: Any) -> Any:
        self.asked += zip(prompts, a, b, strict=True)
        return [(hash((x, s, t)) % 10**9) / 3e9 for x, s, t in zip(prompts, a, b, strict=True)]


TALKS: Any = [(("user", "Hi\n!"), ("user", "\u2028?")), "é"]


def test_a_question_is_asked_once() -> None:
    judge = Counting()
    cached = Cached(judge)
    x, a, b = [*TALKS, "é", "é"], ["1", "1", "1", "2"], ["2", "2", "2", "1"]
    first = cached(x, a, b)
    np.testing.assert_array_equal(first, Counting()(x, a, b))
    assert (cached.calls, cached.hits, len(judge.asked)) == (3, 1, 3)  # the order of a and b counts
    np.testing.assert_array_equal(cached(x[::-1], a[::-1], b[::-1]), first[::-1])
    assert (cached.calls, cached.hits, len(judge.asked)) == (3, 5, 3)
    assert not cached.antisymmetric
    assert Cached(small(PreferenceModel)).antisymmetric
    with pytest.raises(ValueError, match="judge must return 1 probabilities"):
        Cached(lambda *asked: [1.5])(["x"], ["a"], ["b"])


@pytest.mark.parametrize("torn", [b"", b'{"prompt": "x", "a": "\xc3', b'{"prompt": "x", "a": "1", "b": "2", "p": 0.2}'])
@pytest.mark.parametrize("before", ["opened", "running"])
def test_answers_survive_a_kill_and_a_torn_line_is_cut_off(torn: bytes, before: str, tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    judge, cached = Counting(), Cached(Counting(), file)
    p = cached(TALKS, ["1", "1"], ["2", "2"])
    whole = file.read_bytes()
    file.write_bytes(whole + torn)
    if before == "opened":
        cached = Cached(judge, file)
        assert file.read_bytes() == whole
        np.testing.assert_array_equal(cached(TALKS, ["1", "1"], ["2", "2"]), p)
        assert judge.asked == []
    cached(["x"], ["1"], ["2"])
    again = Cached(judge, file)
    np.testing.assert_array_equal(again([*TALKS, "x"], ["1"] * 3, ["2"] * 3)[:2], p)
    assert (again.calls, again.hits) == (0, 3)
    assert file.read_bytes().startswith(whole)


def test_a_torn_line_longer_than_a_block(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_bytes(b"x" * 200_000)
    Cached(Counting(), file)
    assert file.read_bytes() == b""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "expected an object with prompt, a, b, p, got JSONDecodeError"),
        ("[]", "expected an object with prompt, a, b, p, got TypeError"),
        ('{"prompt": "x", "a": "1", "b": "2"}', r"expected an object with prompt, a, b, p, got KeyError\('p'\)"),
        ('{"prompt": "x", "a": "1", "b": "2", "p": 2}', r"p must be a probability in \[0, 1\], got 2"),
    ],
)
def test_a_whole_line_that_is_no_answer(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text('{"prompt": "x", "a": "1", "b": "2", "p": 0.5}\n' + line + "\n")
    with pytest.raises(ValueError, match=f"answers.jsonl, line 2: {message}"):
        Cached(Counting(), file)


def test_a_cache_that_cannot_be_written_says_so_before_the_judge_is_asked(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none"):
        Cached(Counting(), tmp_path / "none" / "answers.jsonl")


# --- calibration -------------------------------------------------------------------------------------------------


def test_measures_by_a_loop() -> None:
    rng = np.random.default_rng(0)
    q, p = rng.random(500), rng.random(500)
    q[:20], p[:40] = 0.5, np.round(p[:40])
    found = calibration(q, p)
    right, log_loss, brier, bins = 0.0, 0.0, 0.0, [[0.0, 0.0, 0.0] for _ in range(10)]
    for s, t in zip(q, p, strict=True):
        for outcome, share in ((1, t), (0, 1 - t)):  # on average over w ~ Bernoulli(p)
            hit = 0.5 if s == 0.5 else float((s > 0.5) == outcome)
            right += share * hit
            log_loss -= share * np.log(s if outcome else 1 - s)
            brier += share * (s - outcome) ** 2
            cell = bins[min(int((max(s, 1 - s) - 0.5) / 0.05), 9)]
            cell[0] += share
            cell[1] += share * max(s, 1 - s)
            cell[2] += share * hit
    ece = sum(abs(confidence - won) for _, confidence, won in bins)
    by_hand = np.array([right, log_loss, brier, ece]) / 500
    assert_close([estimate.value for estimate in found.metrics.values()], by_hand, atol=1e-12)
    assert all(e.low < e.value < e.high for name, e in found.metrics.items() if name != "ece")
    entropy = -np.sum([t * np.log(t) for share in p for t in (share, 1 - share) if t > 0]) / 500
    best = [np.maximum(p, 1 - p).mean(), entropy, (p * (1 - p)).mean(), 0.0]
    assert_close([estimate.labels for estimate in found.metrics.values()], best, atol=1e-9)
    swapped = calibration(1 - q, 1 - p)
    assert_close([e.value for e in swapped.metrics.values()], by_hand, atol=1e-9)


def test_the_table_of_reliability() -> None:
    """70 % means 70 %, and the interval is Wilson's, as SciPy has it."""
    q, w = np.array([0.7] * 50 + [0.02] * 20), np.array([1] * 35 + [0] * 15 + [0] * 20)
    found = calibration(q, w, level=0.9)
    table = found.reliability
    assert table.n.tolist() == [50, 20]
    assert_close(table.confidence, [0.7, 0.98], atol=1e-12)
    assert_close(table.won, [0.7, 1.0], atol=1e-12)
    for won, n, low, high in ((35, 50, *table.iloc[0, 3:]), (20, 20, *table.iloc[1, 3:])):
        wilson = binomtest(won, n, 0.5).proportion_ci(0.9, "wilson")
        assert_close([low, high], [wilson.low, wilson.high], atol=1e-12)
    assert_close(found.metrics["ece"].value, 0.02 * 20 / 70, atol=1e-12)
    assert_close(calibration([1.0], [0.0]).metrics["log_loss"].value, -np.log(1e-12), atol=1e-4)


def test_comparisons_of_one_prompt_are_no_independent_evidence() -> None:
    """Each of 40 prompts ten times: the interval is that of 40 comparisons, not of 400."""
    rng = np.random.default_rng(0)
    q, w = rng.random(40), rng.integers(0, 2, 40)
    repeated = partial(calibration, np.repeat(q, 10), np.repeat(w, 10), draws=4000)
    widths = [
        found.metrics["accuracy"].high - found.metrics["accuracy"].low
        for found in (calibration(q, w, draws=4000), repeated(np.repeat(np.arange(40), 10).tolist()), repeated())
    ]
    assert widths[1] == pytest.approx(widths[0], rel=0.1)
    assert widths[2] == pytest.approx(widths[0] / np.sqrt(10), rel=0.2)
    assert repeated(["x"] * 400).metrics == repeated().metrics  # one prompt: by comparison
    with pytest.raises(ValueError, match=r"predicted must be \(N,\) probabilities in \[0, 1\], as many as labels"):
        calibration([0.5, 2.0], [1, 0])


# --- the command -------------------------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["nlhf", "train", "preference", *flags])
    cli.main()


def write(path: Path, data: list[Comparison]) -> None:
    named = ({"prompt": c.prompt, "response_a": c.a, "response_b": c.b, "p_a": c.p_a} for c in data)
    path.write_text("".join(json.dumps(row) + "\n" for row in named))


@pytest.mark.parametrize("kind", ["pairwise", "bradley-terry"])
@pytest.mark.parametrize("pretrained", [False, True])
def test_the_command(
    kind: str, pretrained: bool, folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pairs.jsonl", rows())
    flags = ["--data", "pairs.jsonl", "--kind", kind, "--held-out", "0.25", "--length", "8", "--lr", "0.01"]
    flags += ["--model", str(folder)] if pretrained else ["--epochs", "2"]
    command(monkeypatch, *flags)
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "learned from 72 comparisons" in printed.out
    assert "held out: 24 comparisons of 2 prompts, 90% intervals" in printed.out
    out = tmp_path / "runs" / "preference-pairs"
    names = {"model.safetensors", "metrics.jsonl", "calibration.csv", "reliability.csv", "reliability.png"}
    assert names | {"reliability.svg"} <= {path.name for path in out.iterdir()}
    judge = (PreferenceModel if kind == "pairwise" else BradleyTerry).load(out)
    assert ((judge(*questions()) > 0) & (judge(*questions()) < 1)).all()
    monkeypatch.setattr(fitting, "_loss", lambda *args: pytest.fail("the run was finished"))
    command(monkeypatch, *flags)
    assert capsys.readouterr().out == printed.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "bad.jsonl"], "bad.jsonl, line 1: expected the columns"),
        (["--data", "none.jsonl"], "none.jsonl: no such file or folder"),
        (
            ["--data", "pairs.jsonl", "--model", "none"],
            "model none: no such file or folder; give a Hugging Face folder",
        ),
        (["--data", "pairs.jsonl", "--out", "bad.jsonl"], "out must be a folder that can be written, got 'bad.jsonl'"),
        (["--data", "pairs.jsonl", "--held-out", "2"], r"held_out must be a share in \[0, 1\), got 2.0"),
        (["--data", "pairs.jsonl", "--lr", "nan"], "lr must be a number > 0, got nan"),
        (["--data", "pairs.jsonl", "--epochs", "0"], "epochs must be an integer >= 1, got 0"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    flags: list[str], message: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pairs.jsonl", rows(2))
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, *flags)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert re.search(f"^nlhf: .*{message}", printed.err)
    assert {path.name for path in tmp_path.iterdir()} == {"pairs.jsonl", "bad.jsonl"}
