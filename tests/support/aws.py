"""A small imitation of AWS on the loopback interface.

It implements S3 objects, the three EC2 calls that `launch/ec2.py` makes, and SageMaker's
CreateTrainingJob. Its objects also serve as the pages of EC2's metadata service.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote

ZONES = {"us-east-1a": 20.0, "us-east-1b": 9.0, "us-east-1c": 11.0}


class AWS:
    """The state of the imitation: the requests that it received and the answers that it gives."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.jobs: list[dict[str, Any]] = []
        self.launches: list[dict[str, str]] = []  # the form of every RunInstances
        self.machines: list[str] = []  # the runs that have a machine
        self.price_requests = 0
        self.prices: Callable[[int], dict[str, float]] = lambda _: ZONES
        self.refuse: Callable[[str], str] = lambda _: ""  # the error code for a zone
        self.url = ""

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment variables that direct AWS's clients to this imitation."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "k",
            "AWS_SECRET_ACCESS_KEY": "s",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1",
            "NO_PROXY": "*",
        }

    def ec2(self, form: dict[str, str]) -> tuple[int, str]:
        """Answer a request to EC2 with an HTTP status and the XML inside the root element."""
        action = form["Action"]
        if action == "DescribeSpotPriceHistory":
            return 200, self.price_history(form["InstanceType.1"])
        if action == "DescribeInstances":
            assert form["Filter.1.Name"] == "tag:anew-run"
            assert form["Filter.2.Name"] == "instance-state-name"
            instance = "<item><instanceId>i-1</instanceId></item>"
            found = instance if form["Filter.1.Value.1"] in self.machines else ""
            set_of_instances = f"<instancesSet>{found}</instancesSet>"
            return 200, f"<reservationSet><item>{set_of_instances}</item></reservationSet>"
        assert action == "RunInstances"
        self.launches.append(form)
        code = self.refuse(form["Placement.AvailabilityZone"])
        if code:
            error = f"<Error><Code>{code}</Code><Message>not now</Message></Error>"
            return 400, f"<Errors>{error}</Errors>"
        self.machines.append(form["TagSpecification.1.Tag.1.Value"])
        return 200, "<instancesSet><item><instanceId>i-1</instanceId></item></instancesSet>"

    def price_history(self, instance: str) -> str:
        """Return an outdated price of 0.01 and the current price for each zone, as XML."""
        self.price_requests += 1
        items = ""
        for zone, current in self.prices(self.price_requests).items():
            for hour, price in ((1, 0.01), (2, current)):
                items += (
                    f"<item><availabilityZone>{zone}</availabilityZone>"
                    f"<instanceType>{instance}</instanceType><spotPrice>{price}</spotPrice>"
                    f"<timestamp>2026-01-01T0{hour}:00:00.000Z</timestamp></item>"
                )
        return f"<spotPriceHistorySet>{items}</spotPriceHistorySet>"


@contextmanager
def serving(aws: AWS) -> Iterator[AWS]:
    """Serve `aws` over HTTP inside the block, at the address `aws.url`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def key(self) -> str:
            return unquote(self.path.split("?")[0])

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
            aws.objects[self.key()] = self.body()
            self.answer(200, b"")

        def do_GET(self) -> None:
            if self.key() in aws.objects:
                self.answer(200, aws.objects[self.key()])
                return
            missing = b"<Error><Code>NoSuchKey</Code><Message>no such key</Message></Error>"
            self.answer(404, missing)

        do_HEAD = do_GET

        def do_POST(self) -> None:
            body = self.body()
            target = self.headers.get("X-Amz-Target")
            if target:
                assert target == "SageMaker.CreateTrainingJob"
                aws.jobs.append(json.loads(body))
                job = b'{"TrainingJobArn": "arn:aws:sagemaker:us-east-1:1:training-job/x"}'
                self.answer(200, job, "application/x-amz-json-1.1")
                return
            form = dict(parse_qsl(body.decode(), keep_blank_values=True))
            status, inner = aws.ec2(form)
            root = "Response" if status >= 400 else f"{form['Action']}Response"
            xml = f"<?xml version='1.0'?><{root}>{inner}<RequestID>1</RequestID></{root}>"
            self.answer(status, xml.encode())

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None: ...  # a test has killed the client

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    aws.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield aws
    finally:
        server.shutdown()
        server.server_close()
