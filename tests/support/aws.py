"""A small AWS on loopback: S3's objects, the three calls of EC2 that a poller makes, and SageMaker's CreateTrainingJob."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote

ZONES = {"us-east-1a": 20.0, "us-east-1b": 9.0, "us-east-1c": 11.0}


class AWS:
    """What was asked of it, and what it answers."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.jobs: list[dict[str, Any]] = []
        self.launches: list[dict[str, str]] = []  # every RunInstances
        self.machines: list[str] = []  # the runs that have one
        self.price_questions = 0
        self.prices: Callable[[int], dict[str, float]] = lambda _: ZONES
        self.refuse: Callable[[str], str] = lambda _: ""  # the error code for a zone
        self.url = ""

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required", "AWS_EC2_METADATA_DISABLED": "true", "AWS_MAX_ATTEMPTS": "1",
            "NO_PROXY": "*",
        }  # fmt: skip

    def ec2(self, form: dict[str, str]) -> tuple[int, str]:
        """(status, XML)."""
        action = form["Action"]
        if action == "DescribeSpotPriceHistory":
            self.price_questions += 1
            items = "".join(
                f"<item><availabilityZone>{zone}</availabilityZone><instanceType>{form['InstanceType.1']}</instanceType>"
                f"<spotPrice>{price}</spotPrice><timestamp>2026-01-01T0{hour}:00:00.000Z</timestamp></item>"
                for zone, now in self.prices(self.price_questions).items()
                for hour, price in ((1, 0.01), (2, now))  # an old price is no price
            )
            return 200, f"<spotPriceHistorySet>{items}</spotPriceHistorySet>"
        if action == "DescribeInstances":
            assert (form["Filter.1.Name"], form["Filter.2.Name"]) == (
                "tag:anew-run",
                "instance-state-name",
            )
            items = (
                "<item><instanceId>i-1</instanceId></item>"
                if form["Filter.1.Value.1"] in self.machines
                else ""
            )
            return (
                200,
                f"<reservationSet><item><instancesSet>{items}</instancesSet></item></reservationSet>",
            )
        assert action == "RunInstances"
        self.launches.append(form)
        if code := self.refuse(form["Placement.AvailabilityZone"]):
            return (
                400,
                f"<Errors><Error><Code>{code}</Code><Message>not now</Message></Error></Errors>",
            )
        self.machines.append(form["TagSpecification.1.Tag.1.Value"])
        return 200, "<instancesSet><item><instanceId>i-1</instanceId></item></instancesSet>"


@contextmanager
def serving(aws: AWS) -> Iterator[AWS]:
    """`aws` behind a URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def answer(self, status: int, content: bytes, kind: str = "text/xml") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", '"0"')
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def do_PUT(self) -> None:
            aws.objects[unquote(self.path.split("?")[0])] = self.body()
            self.answer(200, b"")

        def do_GET(self) -> None:
            found = aws.objects.get(unquote(self.path.split("?")[0]))
            missing = b"<Error><Code>NoSuchKey</Code><Message>no such key</Message></Error>"
            self.answer(200, found) if found is not None else self.answer(404, missing)

        do_HEAD = do_GET

        def do_POST(self) -> None:
            body = self.body()
            if target := self.headers.get("X-Amz-Target"):
                assert target == "SageMaker.CreateTrainingJob"
                aws.jobs.append(json.loads(body))
                self.answer(
                    200,
                    b'{"TrainingJobArn": "arn:aws:sagemaker:us-east-1:1:training-job/x"}',
                    "application/x-amz-json-1.1",
                )
                return
            form = {
                name: values[0]
                for name, values in parse_qs(body.decode(), keep_blank_values=True).items()
            }
            status, inner = aws.ec2(form)
            root = "Response" if status >= 400 else f"{form['Action']}Response"
            self.answer(
                status,
                f"<?xml version='1.0'?><{root}>{inner}<RequestID>1</RequestID></{root}>".encode(),
            )

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None: ...  # a client that was killed

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    aws.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield aws
    finally:
        server.shutdown()
        server.server_close()
