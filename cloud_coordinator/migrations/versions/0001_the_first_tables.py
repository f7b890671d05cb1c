"""The first tables.

Revision: 0001
After:
"""

import sqlalchemy as sa
from alembic import op

from cloud_coordinator.database import UtcDateTime

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Bring the schema to this revision."""
    op.create_table(
        "join_tokens",
        sa.Column("token_id", sa.String(length=64), nullable=False),
        sa.Column("secret_hash", sa.String(length=64), nullable=False),
        sa.Column("uses_left", sa.Integer(), nullable=False),
        sa.Column("created_at", UtcDateTime(timezone=True), nullable=False),
        sa.Column("expires_at", UtcDateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("token_id", name=op.f("pk_join_tokens")),
    )
    op.create_table(
        "rollout_targets",
        sa.Column("task_name", sa.String(length=63), nullable=False),
        sa.Column("model_version", sa.String(length=64), nullable=False),
        sa.Column("set_at", UtcDateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("task_name", name=op.f("pk_rollout_targets")),
    )
    op.create_table(
        "runs",
        sa.Column("run_id", sa.String(length=128), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("cause", sa.Text(), nullable=False),
        sa.Column("plan", sa.JSON(), nullable=False),
        sa.Column("plan_digest", sa.String(length=64), nullable=False),
        sa.Column("created_at", UtcDateTime(timezone=True), nullable=False),
        sa.Column("ended_at", UtcDateTime(timezone=True), nullable=True),
        sa.Column("model_version", sa.String(length=64), nullable=True),
        sa.PrimaryKeyConstraint("run_id", name=op.f("pk_runs")),
    )
    with op.batch_alter_table("runs", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_runs_state"), ["state"], unique=False)

    op.create_table(
        "devices",
        sa.Column("device_id", sa.String(length=63), nullable=False),
        sa.Column("identity_key", sa.String(length=64), nullable=False),
        sa.Column("node_key_pem", sa.String(length=1000), nullable=False),
        sa.Column("token_id", sa.String(length=64), nullable=False),
        sa.Column("enrolled_at", UtcDateTime(timezone=True), nullable=False),
        sa.Column("presence", sa.String(length=16), nullable=False),
        sa.Column("boot", sa.String(length=128), nullable=True),
        sa.Column("presence_at", UtcDateTime(timezone=True), nullable=True),
        sa.Column("last_seen_at", UtcDateTime(timezone=True), nullable=True),
        sa.Column("hello", sa.JSON(), nullable=True),
        sa.Column("telemetry", sa.JSON(), nullable=True),
        sa.Column("telemetry_lost", sa.Integer(), nullable=False),
        sa.Column("reported", sa.JSON(), nullable=True),
        sa.Column("reported_sent_at", UtcDateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["token_id"], ["join_tokens.token_id"], name=op.f("fk_devices_token_id_join_tokens")
        ),
        sa.PrimaryKeyConstraint("device_id", name=op.f("pk_devices")),
        sa.UniqueConstraint("identity_key", name=op.f("uq_devices_identity_key")),
        sa.UniqueConstraint("node_key_pem", name=op.f("uq_devices_node_key_pem")),
    )
    op.create_table(
        "model_versions",
        sa.Column("run_id", sa.String(length=128), nullable=False),
        sa.Column("version", sa.String(length=64), nullable=True),
        sa.Column("model", sa.String(length=63), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("cause", sa.Text(), nullable=False),
        sa.Column("created_at", UtcDateTime(timezone=True), nullable=False),
        sa.Column("signed_at", UtcDateTime(timezone=True), nullable=True),
        sa.Column("rounds", sa.Integer(), nullable=False),
        sa.Column("parameters_sha256", sa.String(length=64), nullable=False),
        sa.Column("parent", sa.String(length=64), nullable=True),
        sa.Column("sealed", sa.LargeBinary(), nullable=True),
        sa.ForeignKeyConstraint(
            ["run_id"], ["runs.run_id"], name=op.f("fk_model_versions_run_id_runs")
        ),
        sa.PrimaryKeyConstraint("run_id", name=op.f("pk_model_versions")),
        sa.UniqueConstraint("version", name=op.f("uq_model_versions_version")),
    )
    with op.batch_alter_table("model_versions", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_model_versions_model"), ["model"], unique=False)
        batch_op.create_index(batch_op.f("ix_model_versions_state"), ["state"], unique=False)

    op.create_table(
        "rounds",
        sa.Column("run_id", sa.String(length=128), nullable=False),
        sa.Column("round_number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("cause", sa.Text(), nullable=False),
        sa.Column("started_at", UtcDateTime(timezone=True), nullable=False),
        sa.Column("closed_at", UtcDateTime(timezone=True), nullable=False),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("training_sums", sa.JSON(), nullable=False),
        sa.Column("parameters_sha256", sa.String(length=64), nullable=True),
        sa.Column("optimizer_sha256", sa.String(length=64), nullable=True),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name=op.f("fk_rounds_run_id_runs")),
        sa.PrimaryKeyConstraint("run_id", "round_number", name=op.f("pk_rounds")),
    )
    op.create_table(
        "desired_states",
        sa.Column("device_id", sa.String(length=63), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("model_version", sa.String(length=64), nullable=False),
        sa.Column("set_at", UtcDateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["device_id"], ["devices.device_id"], name=op.f("fk_desired_states_device_id_devices")
        ),
        sa.PrimaryKeyConstraint("device_id", name=op.f("pk_desired_states")),
    )
    op.create_table(
        "handled_messages",
        sa.Column("message_id", sa.String(length=128), nullable=False),
        sa.Column("device_id", sa.String(length=63), nullable=False),
        sa.Column("forget_at", UtcDateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["device_id"], ["devices.device_id"], name=op.f("fk_handled_messages_device_id_devices")
        ),
        sa.PrimaryKeyConstraint("message_id", name=op.f("pk_handled_messages")),
    )
    with op.batch_alter_table("handled_messages", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_handled_messages_forget_at"), ["forget_at"], unique=False
        )

    op.create_table(
        "invitations",
        sa.Column("run_id", sa.String(length=128), nullable=False),
        sa.Column("device_id", sa.String(length=63), nullable=False),
        sa.Column("session_id", sa.String(length=128), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("changed_at", UtcDateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["device_id"], ["devices.device_id"], name=op.f("fk_invitations_device_id_devices")
        ),
        sa.ForeignKeyConstraint(
            ["run_id"], ["runs.run_id"], name=op.f("fk_invitations_run_id_runs")
        ),
        sa.PrimaryKeyConstraint("run_id", "device_id", name=op.f("pk_invitations")),
    )
    op.create_table(
        "model_variants",
        sa.Column("run_id", sa.String(length=128), nullable=False),
        sa.Column("variant", sa.String(length=63), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("shipped", sa.Boolean(), nullable=False),
        sa.Column("passed", sa.Boolean(), nullable=False),
        sa.Column("cause", sa.Text(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=True),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("session_config", sa.JSON(), nullable=False),
        sa.Column("latency_p50_us", sa.Double(), nullable=True),
        sa.Column("max_difference", sa.Double(), nullable=True),
        sa.Column("relative_error", sa.Double(), nullable=True),
        sa.Column("agreement", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(
            ["run_id"],
            ["model_versions.run_id"],
            name=op.f("fk_model_variants_run_id_model_versions"),
        ),
        sa.PrimaryKeyConstraint("run_id", "variant", name=op.f("pk_model_variants")),
    )
    with op.batch_alter_table("model_variants", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_model_variants_sha256"), ["sha256"], unique=False)

    op.create_table(
        "participations",
        sa.Column("run_id", sa.String(length=128), nullable=False),
        sa.Column("round_number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("device_id", sa.String(length=63), nullable=False),
        sa.Column("outcome", sa.String(length=16), nullable=False),
        sa.Column("cause", sa.Text(), nullable=False),
        sa.Column("num_examples", sa.Integer(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=True),
        sa.Column("bytes_down", sa.BigInteger(), nullable=False),
        sa.Column("bytes_up", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["device_id"], ["devices.device_id"], name=op.f("fk_participations_device_id_devices")
        ),
        sa.ForeignKeyConstraint(
            ["run_id", "round_number"],
            ["rounds.run_id", "rounds.round_number"],
            name=op.f("fk_participations_run_id_rounds"),
        ),
        sa.PrimaryKeyConstraint(
            "run_id", "round_number", "device_id", name=op.f("pk_participations")
        ),
    )


def downgrade() -> None:
    """Take this revision back."""
    op.drop_table("participations")
    with op.batch_alter_table("model_variants", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_model_variants_sha256"))

    op.drop_table("model_variants")
    op.drop_table("invitations")
    with op.batch_alter_table("handled_messages", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_handled_messages_forget_at"))

    op.drop_table("handled_messages")
    op.drop_table("desired_states")
    op.drop_table("rounds")
    with op.batch_alter_table("model_versions", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_model_versions_state"))
        batch_op.drop_index(batch_op.f("ix_model_versions_model"))

    op.drop_table("model_versions")
    op.drop_table("devices")
    with op.batch_alter_table("runs", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_runs_state"))

    op.drop_table("runs")
    op.drop_table("rollout_targets")
    op.drop_table("join_tokens")
