"""Fault matrix: what each agent does when its model misbehaves, and whether the records stay exact.

    python -m tests.benchmarks.scaffold_faults [--agents codex qwen-code] [--faults reset cut] [--at-once 3]
                                               [--out docs/scaffold-faults.md]

Each cell is one rollout of the check's task through the real gateway in a sandbox without a network. The fault is put
between the sandbox and the gateway, on the agent's first model call (`overflow`: on the second), as the agent sees it;
what the gateway itself prevents (comments in a silent stream) is left out by buffering it. Rows already in --out are
kept, so that a part can be measured again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from aiohttp import web

from kat_stream.env.sandboxes.bwrap import BwrapBackend
from kat_stream.env.scaffolds.check import Checked, check
from kat_stream.env.scaffolds.registry import installed_agents
from kat_stream.env.scaffolds.rehearsal import Front
from topics import Sampling

BODY = 32 << 20
AGENT_S = 200.0
LONG_S = 400.0
FOR_EVER = 1 << 30
CALLS = ("/chat/completions", "/responses", "/messages", ":generateContent", ":streamGenerateContent")
OVERFLOW = {
    "error": {
        "type": "invalid_request_error",
        "code": "context_length_exceeded",
        "message": "This model's maximum context length is 1000 tokens. prompt is too long: 2000 tokens > 1000 maximum",
    }
}


@dataclass(frozen=True)
class Fault:
    """`times` calls from number `first` on (0 is the agent's first) meet it."""

    name: str
    about: str
    status: int = 0
    times: int = 1
    first: int = 0
    stall_s: float = 0.0
    headers_first: bool = True
    cut: bool = False
    reset: bool = False
    endless: bool = False
    seconds: float = AGENT_S


FAULTS = (
    Fault("none", "no fault"),
    Fault("500", "500 once", status=500),
    Fault("429", "429 once, retry-after 1 s", status=429),
    Fault("503", "503 three times", status=503, times=3),
    Fault("400", "400 once", status=400),
    Fault("reset", "connection reset before the answer", reset=True),
    Fault("stall5", "5 s of silence after the headers", stall_s=5.0),
    Fault("stall130", "130 s of silence after the headers", stall_s=130.0, seconds=LONG_S),
    Fault("headers130", "130 s before the headers", stall_s=130.0, headers_first=False, seconds=LONG_S),
    Fault("cut", "the answer breaks off in the middle", cut=True),
    Fault("overflow", "400 context overflow on the second call", status=400, first=1),
    Fault("dead", "500 for ever (60 s)", status=500, times=FOR_EVER, seconds=60.0),
    Fault("endless", "the policy calls a tool for ever, 4 turns allowed", endless=True, seconds=120.0),
)


class FaultyFront:
    """A proxy before the gateway that does harm to chosen calls."""

    def __init__(self, fault: Fault) -> None:
        self.fault, self.seen, self.calls = fault, 0, 0
        self._target = ""
        self._http: aiohttp.ClientSession | None = None

    @asynccontextmanager
    async def before(self, target: str) -> AsyncIterator[str]:
        app = web.Application(client_max_size=BODY)
        app.router.add_route("*", "/{path:.*}", self._serve)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.5)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self._target = target
        async with aiohttp.ClientSession(auto_decompress=False) as self._http:
            try:
                yield f"http://127.0.0.1:{runner.addresses[0][1]}"
            finally:
                await runner.cleanup()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        struck = False
        if request.method == "POST" and request.path.endswith(CALLS):
            struck = self.fault.first <= self.calls < self.fault.first + self.fault.times
            self.calls += 1
        if struck and self.fault.status:
            return self._refused()
        if struck and self.fault.reset and request.transport is not None:
            request.transport.abort()
            return web.Response()
        return await self._carry(request, body, self.fault if struck else FAULTS[0])

    def _refused(self) -> web.Response:
        what = OVERFLOW if self.fault.name == "overflow" else {"error": {"type": "error", "message": self.fault.about}}
        headers = {"retry-after": "1"} if self.fault.status == 429 else {}
        return web.json_response(what, status=self.fault.status, headers=headers)

    async def _carry(self, request: web.Request, body: bytes, fault: Fault) -> web.StreamResponse:
        assert self._http is not None
        kept = {
            name: value for name, value in request.headers.items() if name.lower() not in ("host", "content-length")
        }
        url = f"{self._target}{request.raw_path}"
        async with self._http.request(request.method, url, data=body, headers=kept) as answer:
            whole = await answer.read() if fault.stall_s or fault.cut else b""
            if not fault.headers_first:
                await asyncio.sleep(fault.stall_s)
            headers = {name: answer.headers[name] for name in ("Content-Type",) if name in answer.headers}
            response = web.StreamResponse(status=answer.status, headers=headers)
            if whole:
                response.content_length = len(whole)
            await response.prepare(request)
            if fault.headers_first and fault.stall_s:
                await asyncio.sleep(fault.stall_s)
            if fault.cut:
                await response.write(whole[: len(whole) // 2])
                if request.transport is not None:
                    request.transport.close()
                return response
            if whole:
                await response.write(whole)
            else:
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
            await response.write_eof()
        return response


async def measure(agent: str, fault: Fault, sandboxes: BwrapBackend) -> dict[str, object]:
    """One cell."""
    front = FaultyFront(fault)
    before: Front = front.before
    sampling = Sampling(max_turns=4 if fault.endless else 12, max_new_tokens=2048, max_context=400_000)
    done = await check(agent, sandboxes, front=before, sampling=sampling, seconds=fault.seconds, endless=fault.endless)
    return {
        "outcome": done.trajectory.outcome,
        "score": done.score,
        "calls": front.calls,
        "turns": len(done.trajectory.turns),
        "forks": dict(done.forks),
        "seconds": round(done.trajectory.seconds, 1),
        "inexact": [why for why in done.wrong if why not in _endings(done)],
    }


def _endings(done: Checked) -> Sequence[str]:
    """What is wrong with how it ended, which is the fault's doing and no defect."""
    known = ("answer.txt is not right", "no turn can be trained")
    return [why for why in done.wrong if why in known or why.startswith(done.trajectory.outcome)]


def table(cells: dict[str, dict[str, dict[str, object]]]) -> str:
    """Agents down, faults across."""
    faults = [fault for fault in FAULTS if any(fault.name in row for row in cells.values())]
    lines = ["| agent | " + " | ".join(fault.name for fault in faults) + " |", "|---" * (len(faults) + 1) + "|"]
    lines += [
        f"| {agent} | " + " | ".join(_cell(row.get(f.name)) for f in faults) + " |" for agent, row in cells.items()
    ]
    return "\n".join(lines)


def _cell(cell: dict[str, object] | None) -> str:
    if cell is None:
        return ""
    done = "done" if cell["score"] == 1.0 else "not done"
    inexact = " INEXACT" if cell["inexact"] else ""
    return f"{done}, {cell['outcome']}, {cell['calls']} calls, {cell['seconds']} s{inexact}"


def page(cells: dict[str, dict[str, dict[str, object]]]) -> str:
    about = "\n".join(f"- `{fault.name}`: {fault.about}" for fault in FAULTS)
    inexact = [f"- {a}, {f}: {c['inexact']}" for a, row in cells.items() for f, c in row.items() if c["inexact"]]
    return f"""# What agents do when their model misbehaves

Made by `python -m tests.benchmarks.scaffold_faults`; the numbers behind it are in scaffold-faults.json. Each cell is
one rollout of a one-file task through the real gateway, in a sandbox without a network: whether the file is right, the
rollout's outcome, the model calls that the agent sent (its retries included), and the wall time of the rollout on a
busy machine. An empty cell was not measured. Where an agent needs one call only (aider), `overflow` and `endless` do
not reach it; 0 calls with `time_limit` means that it never came to its first call: the fault was not met either.

{about}

{table(cells)}

In every cell the prompt ids of the records were compared with those that the engine saw, the sampled ids with those the
policy gave, and the trained tokens with all that were sampled. Cells where they disagree:

{chr(10).join(inexact) or "- none"}
"""


async def run(agents: Sequence[str], faults: Sequence[Fault], at_once: int, note: Callable[..., None]) -> None:
    """All cells, `at_once` of them at a time."""
    slots, sandboxes = asyncio.Semaphore(at_once), BwrapBackend()

    async def one(agent: str, fault: Fault) -> None:
        async with slots:
            note(agent, fault, await measure(agent, fault, sandboxes))

    try:
        async with asyncio.TaskGroup() as group:
            for fault in faults:
                for agent in agents:
                    group.create_task(one(agent, fault))
    finally:
        await sandboxes.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", nargs="+", default=installed_agents())
    parser.add_argument("--faults", nargs="+", default=[fault.name for fault in FAULTS])
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("docs/scaffold-faults.md"))
    args = parser.parse_args()
    kept = args.out.with_suffix(".json")
    cells = json.loads(kept.read_text()) if kept.exists() else {}

    def note(agent: str, fault: Fault, cell: dict[str, object]) -> None:
        print(agent, fault.name, _cell(cell), cell["inexact"] or "", flush=True)
        cells.setdefault(agent, {})[fault.name] = cell
        kept.write_text(json.dumps(dict(sorted(cells.items())), indent=1) + "\n")
        args.out.write_text(page(dict(sorted(cells.items()))))

    chosen = [fault for fault in FAULTS if fault.name in args.faults]
    asyncio.run(run(args.agents, chosen, args.at_once, note))


if __name__ == "__main__":
    main()
