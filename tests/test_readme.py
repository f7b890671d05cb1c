"""The README's tutorial, run as it stands: documentation that nobody runs is wrong soon."""

import os
import re
import subprocess
import sys
from pathlib import Path

from shared.listening import free_port

ROOT = Path(__file__).parent.parent
# A step that fails ends the script, and the script's end ends what it started.
PREAMBLE = "set -euo pipefail; set -m; trap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n"
SETUP = "make install\nsource .venv/bin/activate\n"  # the test runs inside what these two make


def tutorial() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("<!-- tutorial: begin -->")[1].split("<!-- tutorial: end -->")[0]
    commands = "".join(re.findall(r"```bash\n(.*?)```", section, re.DOTALL))
    assert SETUP in commands
    return commands.replace(SETUP, "")


def test_the_tutorial_leads_from_csv_files_to_a_served_prediction(tmp_path: Path) -> None:
    port = free_port()
    done = subprocess.run(
        ["bash", "-c", PREAMBLE + tutorial().replace(":8470", f":{port}")],
        cwd=tmp_path,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "SHOAL_PORT": str(port),
            "SHOAL_MQTT_PORT": "0",
            "SHOAL_FLEET_PORT": "0",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"15 +committed .*accuracy=0\.(8[5-9]|9)", done.stdout)
    assert '"model_name":"tumour"' in done.stdout
