"""What a sum is asked about, as digests that coordinator and device compute alike.

A device computes them over what it *received*, so that devices which were asked different things
do not understand each other. A vector is spent for one base model and one question; therefore the
round's number and seed are no part of a question: a round that is claimed to have failed cannot be
asked again under another number.
"""

import hashlib

import numpy as np

from shared.parameters import Vector

# How a refusal to send a second vector begins; the coordinator then asks that device no more.
SPENT = "a vector for this run, base and question was sent already; it is spent"


def base_digest_of(parameters: Vector) -> str:
    """Return the hex SHA-256 of parameters, shape (d,) float32, as every device receives them."""
    content = np.ascontiguousarray(parameters, dtype="<f4")
    return hashlib.sha256(b"shoal parameters v1\0" + content.tobytes()).hexdigest()


def training_question(plan: bytes, student: bytes = b"") -> str:
    """Return the digest of "train like this": the JSON exactly as it travels.

    Args:
        plan: how to train.
        student: which network, and whose pupil it is; empty: the task's own.
    """
    content = b"\0".join(filter(None, (plan, student)))  # JSON holds no zero byte
    return hashlib.sha256(b"shoal question v1: train\0" + content).hexdigest()


def evaluation_question(student: bytes = b"") -> str:
    """Return the digest of "measure these parameters on held-out rows".

    ``student`` is as in `training_question`.
    """
    return hashlib.sha256(b"shoal question v1: evaluate\0" + student).hexdigest()


def statistics_question(question: bytes) -> str:
    """Return the digest of "what are your rows like": the question's JSON as it travels."""
    return hashlib.sha256(b"shoal question v1: statistics\0" + question).hexdigest()
