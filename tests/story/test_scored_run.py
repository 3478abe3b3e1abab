"""A run with a scorer, a teacher and a learner of two processes: scores reach the batches, and the account closes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kat_stream.observe.sources import archived_ledger, archived_records
from kat_stream.ports import choose_port
from tests.story.conftest import DEMO, kat, settings
from topics import PackedBatch, Score, TrainStep, Trajectory
from topics.record import floats


def test_scores_are_joined_and_trained_on(tmp_path: Path) -> None:
    port = choose_port()
    teacher = f'{{name="self", url="http://127.0.0.1:{port}", model="demo", scores={{"mend/shell"=0.9}}}}'
    changes = {
        "run__name": "scored",
        "engine__port": str(port),
        "sampler__eval_before": "false",
        "sampler__eval_after": "false",
        "scorer__enabled": "true",
        "scorer__repeats": "2",
        "scorer__teachers": f"[{teacher}]",
        "trainer__distillation_coefficient": "0.1",
        "trainer__ranks": "2",
    }
    done = kat("run", DEMO, *settings(tmp_path, **changes))
    assert done.returncode == 0, done.stdout + done.stderr
    run_dir = tmp_path / "scored"
    records = [record for record, _ in archived_records(run_dir)]
    scores = [record for record in records if isinstance(record, Score)]
    graded = [r.rollout_id for r in records if isinstance(r, Trajectory) and r.gradable]
    assert sorted((s.rollout_id, s.kind) for s in scores) == sorted(
        (r, k) for r in graded for k in ("repeats", "teacher")
    )
    assert {score.reason for score in scores} <= {"", "other_version"} and any(not score.reason for score in scores)
    rows = [row for record in records if isinstance(record, PackedBatch) for row in record.rows]
    assert rows and all(len(row.teacher_logprobs) == len(row.logprobs) for row in rows)
    scored = [floats(row.scored_logprobs) for row in rows if row.scored_logprobs]
    assert scored and not np.isnan(np.concatenate(scored)).all()
    taught = [s for s in records if isinstance(s, TrainStep) if s.trained]
    assert taught and all(s.metrics["applied"] for s in taught)
    assert archived_ledger(run_dir).summary().requested == archived_ledger(run_dir).summary().accounted == 24
