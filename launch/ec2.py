"""Wait for a GPU machine on EC2 whose price is right, and train on it.

    python launch/ec2.py gpt2-124m --bucket MINE --instance p4d.24xlarge --max-price 14 -- --steps 19073

asks every zone of the regions for its spot price, takes the cheapest below --max-price (dollars an hour for the whole machine),
tries the next where there is no capacity, and tries again until there is. The machine (ec2_user_data.sh) trains, keeps the run
folder in the bucket, saves when it is about to be taken away, and ends itself when the run is complete. A run that already has a
machine gets no second one; with --keep the script stays and gets a new one whenever it was taken away. What stands behind `--` are
settings of `anew train`.
"""

import hashlib
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import tyro

sys.path.insert(0, str(Path(__file__).parent))
from source import archive

USER_DATA = Path(__file__).with_name("ec2_user_data.sh")
# Ubuntu with NVIDIA's driver and PyTorch: docs.aws.amazon.com/dlami/latest/devguide/find-dlami-id.html
IMAGE = "resolve:ssm:/aws/service/deeplearning/ami/x86_64/oss-nvidia-driver-gpu-pytorch-2.9-ubuntu-24.04/latest/ami-id"
ELSEWHERE = {
    "InsufficientInstanceCapacity",
    "SpotMaxPriceTooLow",
    "Unsupported",
    "InsufficientHostCapacity",
    "InsufficientFreeAddressesInSubnet",
}
LATER = {"RequestLimitExceeded", "InternalError", "Unavailable", "ServiceUnavailable"}
QUOTA = {"MaxSpotInstanceCountExceeded", "VcpuLimitExceeded", "InstanceLimitExceeded"}


@dataclass
class Machine:
    """A machine and what it is to do."""

    recipe: tyro.conf.Positional[str]
    """what to train, e.g. gpt2-124m"""
    bucket: str
    """S3 bucket for source and run folder"""
    max_price: float
    """most dollars an hour for the machine"""
    instance: str = "p4d.24xlarge"
    """kind of machine"""
    name: str = ""
    """name of the run; by default the recipe"""
    regions: list[str] = field(default_factory=lambda: ["us-east-1", "us-east-2", "us-west-2"])
    """where to look"""
    profile: str = "anew"
    """instance profile that may read and write the bucket"""
    hours: float = 48.0
    """the machine ends itself after this long, whatever happens"""
    disk_gb: int = 200
    """its disk"""
    image: str = IMAGE
    """machine image"""
    key_name: str = ""
    """key pair for ssh"""
    every: float = 60.0
    """seconds between two rounds of asking"""
    keep: bool = False
    """stay, and get a new machine when this one was taken away, until the run is complete"""
    dry_run: bool = False
    """say the prices and end"""


def main(machine: Machine, settings: list[str]) -> None:
    """Get machines until one runs; with `keep` until the run is complete."""
    import boto3

    run = machine.name or machine.recipe
    clients = {region: boto3.client("ec2", region_name=region) for region in machine.regions}
    s3 = boto3.client("s3", region_name=machine.regions[0])
    if not machine.dry_run:
        s3.put_object(Bucket=machine.bucket, Key=f"anew/{run}/source.tar.gz", Body=archive())
    attempt = 0
    while True:
        if status(s3, machine.bucket, run) == "complete":
            say(f"the run {run} is complete: s3://{machine.bucket}/anew/{run}/run")
            return
        if found := running(clients, run):
            say(f"{found} is running {run}")
            if not machine.keep:
                return
            time.sleep(machine.every)
            continue
        offers = sorted(prices(clients, machine.instance))
        for price, zone, _ in offers:
            say(
                f"{zone}: ${price:.2f} an hour"
                + (f", above ${machine.max_price:.2f}" if price > machine.max_price else "")
            )
        if machine.dry_run:
            return
        if not offers:
            fail(
                f"no zone of {', '.join(machine.regions)} has {machine.instance}; choose another --instance or --regions."
            )
        attempt += 1
        if not any(
            take(clients[region], machine, settings, run, zone, attempt)
            for price, zone, region in offers
            if price <= machine.max_price
        ):
            time.sleep(machine.every)


def prices(clients: dict[str, Any], instance: str) -> list[tuple[float, str, str]]:
    """(dollars an hour, zone, region) of every zone that has such machines to spare."""
    found = []
    for region, ec2 in clients.items():
        latest: dict[str, tuple[Any, float]] = {}
        pages = ec2.get_paginator("describe_spot_price_history").paginate(
            InstanceTypes=[instance], ProductDescriptions=["Linux/UNIX"], StartTime=int(time.time())
        )
        for entry in (entry for page in pages for entry in page["SpotPriceHistory"]):
            zone, at = entry["AvailabilityZone"], entry["Timestamp"]
            if zone not in latest or at > latest[zone][0]:
                latest[zone] = at, float(entry["SpotPrice"])
        found += [(price, zone, region) for zone, (_, price) in latest.items()]
    return found


def running(clients: dict[str, Any], run: str) -> str:
    """The machine that has this run, if there is one: a run folder has one writer."""
    filters = [
        {"Name": "tag:anew-run", "Values": [run]},
        {"Name": "instance-state-name", "Values": ["pending", "running", "shutting-down"]},
    ]
    for region, ec2 in clients.items():
        for page in ec2.get_paginator("describe_instances").paginate(Filters=filters):
            for reservation in page["Reservations"]:
                for instance in reservation["Instances"]:
                    return f"{instance['InstanceId']} ({region})"
    return ""


def take(
    ec2: Any, machine: Machine, settings: list[str], run: str, zone: str, attempt: int
) -> bool:
    """Ask for one machine in `zone`; False where there is none now."""
    from botocore.exceptions import ClientError

    request: dict[str, Any] = {
        # A request repeated because its answer was lost gets the machine that was started, not another.
        "ClientToken": hashlib.sha256(
            f"{run} {zone} {attempt} {time.time():.0f}".encode()
        ).hexdigest()[:48],
        "ImageId": machine.image,
        "InstanceType": machine.instance,
        "MinCount": 1,
        "MaxCount": 1,
        "Placement": {"AvailabilityZone": zone},
        "InstanceMarketOptions": {
            "MarketType": "spot",
            "SpotOptions": {
                "MaxPrice": f"{machine.max_price:.4f}",
                "SpotInstanceType": "one-time",
                "InstanceInterruptionBehavior": "terminate",
            },
        },
        "InstanceInitiatedShutdownBehavior": "terminate",
        "IamInstanceProfile": {"Name": machine.profile},
        "MetadataOptions": {"HttpTokens": "required"},
        "BlockDeviceMappings": [
            {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": machine.disk_gb, "VolumeType": "gp3"}}
        ],
        "TagSpecifications": [
            {
                "ResourceType": "instance",
                "Tags": [
                    {"Key": "anew-run", "Value": run},
                    {"Key": "Name", "Value": f"anew {run}"},
                ],
            }
        ],
        "UserData": user_data(machine, settings, run),
    }
    if machine.key_name:
        request["KeyName"] = machine.key_name
    try:
        [instance] = ec2.run_instances(**request)["Instances"]
    except ClientError as error:
        code, text = error.response["Error"]["Code"], error.response["Error"]["Message"]
        if code in QUOTA:
            fail(
                f"your account may not have {machine.instance} ({text}); ask AWS for a higher quota, or choose a smaller --instance."
            )
        if code not in ELSEWHERE | LATER:
            fail(f"EC2 refused the request: {text} ({code}).")
        say(f"{zone}: {code}")
        return False
    say(
        f"{zone}: {instance['InstanceId']} starts, at most ${machine.max_price:.2f} an hour for {machine.hours:g} h"
    )
    return True


def user_data(machine: Machine, settings: list[str], run: str) -> str:
    """What the machine runs when it starts: the script beside this file, with its settings in front."""
    values = {
        "ANEW_S3": f"s3://{machine.bucket}/anew/{run}",
        "ANEW_MINUTES": str(round(machine.hours * 60)),
        "ANEW_TRAIN": shlex.join([machine.recipe, *settings]),
    }
    first, rest = USER_DATA.read_text(encoding="utf-8").split("\n", 1)
    text = "\n".join(
        [first, *(f"export {name}={shlex.quote(value)}" for name, value in values.items()), rest]
    )
    if len(text) > 16_384:
        fail("the settings are too long for EC2; put them into a recipe.")
    return text


def status(s3: Any, bucket: str, run: str) -> str:
    """What the run's run_state.json in the bucket says."""
    import json

    from botocore.exceptions import ClientError

    try:
        return str(
            json.loads(
                s3.get_object(Bucket=bucket, Key=f"anew/{run}/run/run_state.json")["Body"].read()
            )["status"]
        )
    except (ClientError, ValueError, KeyError):
        return ""


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def fail(sentence: str) -> NoReturn:
    print(f"ec2: {sentence}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    main(tyro.cli(Machine, args=sys.argv[1:cut], description=__doc__), sys.argv[cut + 1 :])
