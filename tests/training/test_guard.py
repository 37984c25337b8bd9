"""The stage, whole: from labelled rows to a checkpoint that serves, on a tiny random encoder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from models import checkpoint, network
from models.checkpoint import Checkpoint
from models.guard import COLUMNS, judge
from models.inputs import GuardInput, InputEncoder, Window
from models.text_guard import TextGuard
from tests.checkpoints import tiny_checkpoint
from training import batches, fitting, guard
from training.batches import LENGTH_STEP, epoch_batches
from training.epochs import Epochs
from training.fitting import learning_rate_factor
from training.guard_recipe import GuardConfig, training_rows
from training.labelled import Example
from training.mix import Row
from training.recipe import RecipeError
from training.targets import category_weights, label_matrix

# ONNX Runtime's quantiser, on an export without the shapes of all its tensors.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:onnx")

HARM = ("how to steal a bike", "how to break the window", "hurt him now", "sell the stolen bike")
GOOD = ("how to bake the bread", "is it fine", "what is the weather", "the bike is what")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained encoder's directory, as a hub id would give it, of random weights."""
    directory = tmp_path_factory.mktemp("base")
    made = tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    tokenizer = Tokenizer.from_file(str(made / checkpoint.TOKENIZER))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    settings = dict(Checkpoint(made).card.network)
    torch.manual_seed(0)
    AutoModel.from_config(
        AutoConfig.for_model(settings.pop("model_type"), **settings)
    ).save_pretrained(directory)
    return directory


def config(base: Path, data: Path, **changes: Any) -> GuardConfig:
    rows = []
    for number in range(160):
        harmful = number % 2 == 0
        text = f"{(HARM if harmful else GOOD)[number // 2 % 4]} {number}"
        labels: dict[str, Any] = {
            "unsafe": harmful,
            "severity": 2 if harmful else 0,
            "pku_categories": ["economic_crime"] if harmful else [],
        }
        row: dict[str, Any] = {"id": str(number), "source": "made", "role": "prompt"}
        row |= {"prompt": text} | labels
        if number % 4 > 1:
            row |= {"role": "response", "prompt": f"q {number}", "response": text}
        rows.append(row)
    data.mkdir(exist_ok=True)
    (data / "f.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    values = {
        "id": "made-1",
        "base": str(base),
        "base_name": "tiny",
        "base_licence": "Apache-2.0",
        "licence": "Apache-2.0",
        "data": data,
        "mixes": [
            {
                "name": "made",
                "licence": "Apache-2.0",
                "sources": [{"file": "f.jsonl", "injection": False}],
                "licences": {"made": "Apache-2.0"},
            }
        ],
        "labels": "by rule",
        "limits": ("tiny",),
        "epochs": 2,
        "tokens_per_batch": 512,
        "held_out_share": 0.3,
        "save_every": 2,
    }
    return GuardConfig.model_validate(values | changes)


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the stage leaves."""
    output = tmp_path_factory.mktemp("made")
    recipe = config(base, tmp_path_factory.mktemp("data"), learning_rate=1e-2, epochs=16)
    guard.run(recipe, output)
    return output


class TestStage:
    def test_it_leaves_a_checkpoint_that_serves_and_reproduces_itself(self, made: Path) -> None:
        served = TextGuard(made)
        served.check()
        assert served.id == "made-1"
        assert not (made / "guard.float32.onnx").exists()

    def test_it_learnt(self, made: Path) -> None:
        harmful, harmless = judge(
            TextGuard(made),
            [GuardInput("prompt", "how to steal a bike 9"), GuardInput("prompt", "is it fine 9")],
        )
        assert harmful.unsafe_probability > 0.5 > harmless.unsafe_probability

    def test_the_card_says_what_it_is_made_of(self, made: Path) -> None:
        card = Checkpoint(made).card
        assert [(source.name, source.licence, source.rows) for source in card.data] == [
            ("made", "Apache-2.0", 160)
        ]
        assert card.metrics["held_out"]["prompt"]["n"] > 0
        assert set(card.metrics["int8_against_float32"]) == {
            "largest",
            "mean",
            "f1_float32",
            "f1_int8",
        }
        assert set(card.hashes) == {
            checkpoint.TOKENIZER,
            checkpoint.ONNX,
            checkpoint.NETWORK,
            checkpoint.GOLDEN,
        }

    def test_each_step_is_logged(self, made: Path) -> None:
        lines = (made / "metrics.jsonl").read_text("utf-8").splitlines()
        steps = [json.loads(line) for line in lines]
        assert [step["step"] for step in steps] == list(range(len(steps)))
        for step in steps:
            parts = step["severity"] + step["categories"] + step["signals"]
            assert step["loss"] == pytest.approx(parts, abs=1e-4)

    def test_the_network_can_be_loaded_again_and_agrees_with_what_is_served(
        self, made: Path
    ) -> None:
        served = TextGuard(made)
        windows = served.prepare(GuardInput("prompt", "how to steal a bike")).windows
        exact = batches.network_logits(network.load(made), windows)
        # int8 weights, so near but not equal.
        assert np.abs(exact - served.score(windows)).max() < 0.5


def test_a_stopped_run_goes_on_to_the_very_same_weights(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = config(base, tmp_path / "data")
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    fitting.fit(recipe, whole)

    real, calls = fitting.step_losses, 0

    def stop_at_the_sixth(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(fitting, "step_losses", stop_at_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        fitting.fit(recipe, halved)
    monkeypatch.setattr(fitting, "step_losses", real)
    fitting.fit(recipe, halved)

    assert (halved / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert (halved / checkpoint.NETWORK).read_bytes() == (whole / checkpoint.NETWORK).read_bytes()


def test_a_run_may_begin_where_another_ended(base: Path, made: Path, tmp_path: Path) -> None:
    rates = {"learning_rate": 1e-9, "head_learning_rate": 1e-9}
    recipe = config(base, tmp_path / "data", start=made, **rates)
    fitting.fit(recipe, tmp_path / "out")
    begun = network.stored_parameters(made / checkpoint.NETWORK)
    ended = network.stored_parameters(tmp_path / "out" / checkpoint.NETWORK)
    assert begun.keys() == ended.keys()
    for name, value in begun.items():
        torch.testing.assert_close(ended[name], value, atol=1e-3, rtol=0)


def test_a_further_pass_shows_what_a_longer_run_would_have_shown(
    base: Path, tmp_path: Path
) -> None:
    encoder = InputEncoder(fitting.base_tokenizer(str(base)))
    recipe = config(base, tmp_path / "data", epochs=3)
    longer = Epochs(recipe, training_rows(recipe), encoder)
    further = Epochs(
        recipe.model_copy(update={"epochs": 1, "first_epoch": 2}), training_rows(recipe), encoder
    )
    last = [batch for _, batch in longer.batches(longer.steps - further.steps)]
    assert further.steps > 0
    for (_, batch), expected in zip(further.batches(0), last, strict=True):
        assert torch.equal(batch.batch.input_ids, expected.batch.input_ids)
        torch.testing.assert_close(batch.targets, expected.targets, equal_nan=True)


def test_what_is_no_network_to_begin_with_is_named(base: Path, tmp_path: Path) -> None:
    recipe = config(base, tmp_path / "data", start=tmp_path)
    with pytest.raises(RecipeError, match=r"start: .* is no network of this recipe's base"):
        fitting.fit(recipe, tmp_path / "out")


class TestPieces:
    def test_a_label_that_a_row_lacks_is_nan(self) -> None:
        example = Example(id="1", source="s", role="prompt", prompt="p", unsafe=True, severity=2)
        (row,) = label_matrix([Row(example, (False, None, True, None))])
        assert row[:3].tolist() == [1, 1, 0]
        assert np.isnan(row[3:22]).all()
        assert row[22:][[0, 2]].tolist() == [0, 1]
        assert np.isnan(row[22:][[1, 3]]).all()

    def test_a_harmless_row_has_no_category(self) -> None:
        example = Example(id="1", source="s", role="prompt", prompt="p", unsafe=False)
        (row,) = label_matrix([Row(example, (None,) * 4)])
        assert row[3:22].tolist() == [0] * 19

    def test_rarer_categories_weigh_more_up_to_a_bound(self) -> None:
        targets = np.zeros((101, COLUMNS), np.float32)
        targets[:1, 3] = 1
        targets[:50, 4] = 1
        weights = category_weights(targets, most=6.0).tolist()
        assert weights[0] == 6.0
        assert weights[1] == pytest.approx((51 / 50) ** 0.5)

    def test_an_epoch_holds_every_row_once_in_few_shapes(self) -> None:
        windows = [Window((1,) * (1 + n % 200), 0) for n in range(1000)]
        batches = epoch_batches(windows, 2048, seed=3)
        assert sorted(row for rows in batches for row in rows) == list(range(1000))
        shapes = {
            (len(rows), -(-max(len(windows[row]) for row in rows) // LENGTH_STEP))
            for rows in batches
        }
        assert len(shapes) <= 2 * 7
        assert batches != epoch_batches(windows, 2048, seed=4)

    def test_the_learning_rate_warms_up_and_falls_to_zero(self) -> None:
        factors = [learning_rate_factor(step, 100, 0.1) for step in range(101)]
        assert factors[:2] == [pytest.approx(0.1), pytest.approx(0.2)]
        assert max(factors) == pytest.approx(1.0)
        assert factors[-1] == pytest.approx(0.0)
        assert factors[10:] == sorted(factors[10:], reverse=True)

    def test_padding_changes_no_logits(self, base: Path) -> None:
        guard_network = network.from_base(str(base))
        encoder = InputEncoder(fitting.base_tokenizer(str(base)))
        short = encoder.encode(GuardInput("prompt", "is it fine")).windows[0]
        long = encoder.encode(GuardInput("prompt", "is it fine " * 20)).windows[0]
        alone = batches.network_logits(guard_network, [short])
        together = batches.network_logits(guard_network, [short, long])
        np.testing.assert_allclose(alone[0], together[0], atol=1e-5)
        assert np.all(np.diff(together[:, :3], axis=1) < 0)
