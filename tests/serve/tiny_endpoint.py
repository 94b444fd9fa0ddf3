"""Settings of the endpoint that the tests share."""

from pathlib import Path

from vpo_ray.recipe import Serve, load

CHROMIUM = Path("/usr/bin/chromium")
TINY = Path(__file__).parents[2] / "jobs/recipes/tiny.yaml"
# One sequence at a time, so that an answer that nobody reads any more would block the next.
SETTINGS: Serve = load(
    TINY,
    [
        "serve.port=0",
        "serve.max_query_chars=3000",
        "serve.max_tokens=1700",
        "serve.engine.max_num_seqs=1",
        "serve.max_queued_requests=20",
    ],
).serve
