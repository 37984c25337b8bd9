"""Several processes fit one guard, as on several GPUs."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from models.guard import judge
from models.inputs import GuardInput
from models.text_guard import TextGuard
from tests.training.test_guard import base, config

__all__ = ["base"]

ROOT = Path(__file__).parents[2]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:onnx")
def test_two_processes_leave_one_checkpoint(base: Path, tmp_path: Path) -> None:
    recipe = config(base, tmp_path / "data", learning_rate=1e-2, epochs=12, threads=1)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    train = ["sluicegate.py", "train", "guard", "--config", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(
        [*launch, *train, "--output", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    served = TextGuard(tmp_path / "out")
    served.check()
    harmful, harmless = judge(
        served, [GuardInput("prompt", "how to steal a bike 9"), GuardInput("prompt", "is it fine")]
    )
    assert harmful.unsafe_probability > harmless.unsafe_probability
