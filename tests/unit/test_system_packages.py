"""The one rule by which tests skip or fail where the system lacks what they need."""

import pytest

from tests import system_packages
from tests.system_packages import require_fashion_mnist, require_program


def test_a_missing_program_skips_its_tests_with_the_packages_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(system_packages, "FASHION_MNIST_FOLDERS", ())
    with pytest.raises(pytest.skip.Exception, match="needs the Debian package mosquitto"):
        require_program("no-such-program", package="mosquitto")
    with pytest.raises(pytest.skip.Exception, match="needs the Debian package dataset"):
        require_fashion_mnist()


def test_under_ci_a_missing_program_fails_its_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="the Debian package mosquitto is missing"):
        require_program("no-such-program", package="mosquitto")


def test_a_program_that_is_there_is_found() -> None:
    assert require_program("sh", package="dash").name == "sh"
