"""boto3's client of this process: which server, who asks, and how often a request is made again.

Credentials, profiles, roles and regions are found by boto3's own rules, and so is the server: `AWS_ENDPOINT_URL_S3`,
`AWS_ENDPOINT_URL` or the profile's. `S3_ENDPOINT_URL` comes before these.
"""

import os
import random
from functools import lru_cache
from typing import Any

from botocore.exceptions import SSLError

from configs.s3_errors import NO_ANSWER, code_of

ATTEMPTS = 10  # of one request, and of going on with a body that breaks off without progress: about half a minute
FIRST_ATTEMPTS = 3  # of a server that has never answered: its address may be wrong
LONGEST_PAUSE_S = 10.0
SILENT_S = 60.0  # after which a server that says nothing more is asked again
CONNECTIONS = 32  # at a time
FOR_A_WHILE = (429, 500, 502, 503, 504)  # HTTP status: throttled, or broken
# Of answers with the status 400: a body that came too slowly, or not as it was sent, and servers that throttle so.
AGAIN = ("RequestTimeout", "BadDigest", "Throttling", "ThrottlingException")


def client() -> Any:
    """boto3's client of this process, made anew when the environment names another server or identity."""
    told = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_") or k == "S3_ENDPOINT_URL"))
    return _client(os.getpid(), told)


@lru_cache(maxsize=1)
def _client(pid: int, told: tuple[tuple[str, str], ...]) -> Any:
    # One per process, since a client does not survive a fork; boto3 is imported only where s3 is used.
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"total_max_attempts": 1},  # Retries repeats: botocore gives up after three seconds of an outage
        connect_timeout=10,
        read_timeout=SILENT_S,
        max_pool_connections=CONNECTIONS,
        tcp_keepalive=True,
    )
    # A session of its own: the default one keeps the credentials that it found first.
    made = boto3.Session().client("s3", endpoint_url=dict(told).get("S3_ENDPOINT_URL") or None, config=config)
    made.meta.events.register("needs-retry.s3", Retries())
    return made


class Retries:
    """Says of every request of a client whether it is made again, and after how long."""

    def __init__(self) -> None:
        self.answered = False

    def __call__(self, response: Any, attempts: int, caught_exception: Any, **_: Any) -> float | None:
        """Seconds to wait, or None; `response` is HTTP's and what its body says, if there is any."""
        self.answered = self.answered or response is not None
        if response is None:
            fails = isinstance(caught_exception, NO_ANSWER) and not isinstance(caught_exception, SSLError)
        else:
            fails = response[0].status_code in FOR_A_WHILE or code_of(response[1]) in AGAIN
        if not fails or attempts >= (ATTEMPTS if self.answered else FIRST_ATTEMPTS):
            return None
        return pause_s(attempts)


def pause_s(failed: int) -> float:
    """How long to wait after so many failures: longer each time, and not all who were turned away as long."""
    return random.uniform(0.5, 1) * min(LONGEST_PAUSE_S, 0.1 * 2**failed)
