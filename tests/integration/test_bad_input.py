"""What people get wrong, told by the real programs: one sentence, exit status 1, no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.listening import free_port

TIME_LIMIT_S = 60.0
PACKAGES = {"shoal": "cloud_coordinator", "shoal-agent": "edge_agent", "shoal-sim": "simulations"}
TASK = """
name = "pumps"
uses = "tabular"
[options]
kind = "classification"
target = "state"
labels = ["ok", "failed"]
features = [{ name = "pressure", minimum = 0, maximum = 10 }]
"""
TOKEN = f"shoal1.{'0' * 16}.{'0' * 64}.{'0' * 64}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files that people might write; ``{port}`` below is one where nobody listens."""
    contents = {
        "unknown.toml": "prot = 1",
        "wrong.toml": 'port = "many"',
        "task.toml": TASK,
        "typo.toml": TASK.replace("kind", "sort"),
        "plan.toml": 'name = "x"\ntask = "task.toml"\nruonds = 3',
        "labels.csv": "pressure,state\n1,broken\n2,gone",
        "good.csv": "pressure,state\n" + "\n".join(f"{n / 10},ok" for n in range(100)),
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "node.pem").write_text("no key")
    (tmp_path / "noise.csv").write_bytes(bytes(range(256)) * 10)
    return tmp_path


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("shoal serve --home h --config unknown.toml", "unknown key 'prot'"),
        ("shoal serve --home h --config wrong.toml", "valid integer"),
        ("shoal serve --home good.csv", "cannot write to "),
        ("shoal run start plan.toml --home h", "unknown key 'ruonds'"),
        ("shoal token create --home h", "start one with 'shoal serve"),
        ("shoal broker config --out good.csv/x", "cannot write to good.csv/x: "),
        ("shoal-agent data add d none.csv --task task.toml --home h", "does not exist; check"),
        ("shoal-agent data add d noise.csv --task task.toml --home h", "is not text in UTF-8"),
        ("shoal-agent data add d labels.csv --task task.toml --home h", "none of 'ok', 'failed'"),
        ("shoal-agent data add d good.csv --task typo.toml --home h", "unknown key 'sort'"),
        ("shoal-agent data add d good.csv --task task.toml --home good.csv/h", "Not a directory"),
        ("shoal-agent enroll --home h --coordinator nowhere --token no", "not a join token"),
        (
            "shoal-agent enroll --home h --coordinator http://127.0.0.1:{port} --token {token}",
            "is 'shoal serve' running?",
        ),
        ("shoal-agent enroll --home good.csv --coordinator x --token {token}", "cannot write to "),
        (
            "shoal-agent enroll --home junk --coordinator http://127.0.0.1:{port} --token {token}",
            "a key file in junk is damaged",
        ),
        ("shoal-agent status --home h", "run 'shoal-agent enroll"),
        ("shoal-sim demo --home good.csv", "good.csv/logs: Not a directory; check"),
        ("shoal-sim demo --home h --data .", "name the folder with Fashion-MNIST"),
        ("shoal-sim bench nothing", "choose one of"),
    ],
)
def test_a_program_says_in_one_sentence_what_to_mend_and_exits_with_1(
    folder: Path, command: str, sentence: str
) -> None:
    program, *arguments = command.format(port=free_port(), token=TOKEN).split()
    done = subprocess.run(
        [sys.executable, "-m", PACKAGES[program], *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
        timeout=TIME_LIMIT_S,
    )
    assert done.returncode == 1, done.stderr
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
