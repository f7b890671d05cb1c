import pytest

from shared.errors import UnavailableError
from simulations.benchmarks.wrk import Load, read_report, require_wrk

REPORT = """Running 2s test @ http://127.0.0.1:8480/v2/models/cnn/infer
  1 threads and 32 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     3.79ms    1.02ms  18.21ms   89.61%
    Req/Sec     8.49k   713.25     9.48k    75.00%
  Latency Distribution
     50%  {p50}
     75%    4.10ms
  16901 requests in 2.00s, 3.51MB read
{failures}Requests/sec:   8448.33
Transfer/sec:      1.75MB
"""


@pytest.mark.parametrize(
    ("p50", "p50_ms"), [("212.00us", 0.212), ("  3.55ms", 3.55), ("1.20s", 1200.0)]
)
def test_requests_and_the_median_are_read(p50: str, p50_ms: float) -> None:
    assert read_report(REPORT.format(p50=p50, failures="")) == Load(16901, 0, p50_ms)


def test_refused_and_broken_requests_are_failed_ones() -> None:
    failures = (
        "  Socket errors: connect 1, read 2, write 0, timeout 4\n  Non-2xx or 3xx responses: 10\n"
    )
    assert read_report(REPORT.format(p50="1.00ms", failures=failures)).failed == 17


def test_a_report_that_is_not_understood_is_an_error() -> None:
    with pytest.raises(UnavailableError, match="unable to connect"):
        read_report("unable to connect to 127.0.0.1:1 Connection refused")


def test_a_machine_without_wrk_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UnavailableError, match="apt-get install wrk"):
        require_wrk()
