"""What a person reads about a run that is under way."""

from datetime import UTC, datetime

from cloud_coordinator.runs.progress import Progress

SINCE = datetime(2026, 11, 23, 12, 0, 3, tzinfo=UTC)
UNTIL = datetime(2026, 11, 23, 12, 5, 3, tzinfo=UTC)


def test_waiting_says_for_how_many_since_when_and_until_when() -> None:
    progress = Progress(doing="waiting", since=SINCE, until=UNTIL, joined=2, wanted=3)
    assert progress.sentence == (
        "waiting for 1 more device (2 of 3 joined), since 12:00:03, until 12:05:03 UTC"
    )


def test_training_says_how_many_replied() -> None:
    progress = Progress(doing="train", since=SINCE, round_number=4, replied=1, asked=3)
    assert progress.sentence == "round 4: training, 1 of 3 replied, since 12:00:03 UTC"


def test_a_pause_names_its_cause() -> None:
    progress = Progress(doing="pausing", since=SINCE, note="the worker ended with status -9")
    assert progress.sentence == (
        "starting again after the worker ended with status -9, since 12:00:03 UTC"
    )


def test_an_export_says_what_it_does() -> None:
    progress = Progress(doing="exporting", since=SINCE, note="measuring latencies")
    assert progress.sentence == (
        "building the model version (measuring latencies), since 12:00:03 UTC"
    )
