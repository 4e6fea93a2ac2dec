"""Start a GPU machine on EC2 when its spot price is low enough, and train on it.

    python launch/ec2.py gpt2-124m --bucket MINE --max-price 14 -- --steps 19073

The script asks for the spot price in every zone of the regions and requests a machine in the
cheapest zone whose price is at most --max-price (dollars an hour for the whole machine). If that
zone has no capacity, it tries the next zone, and it repeats this until a machine starts. The
machine runs ec2_user_data.sh: it trains, copies the run folder to the bucket, saves a checkpoint
when EC2 announces an interruption, and shuts itself down when the run is complete. A run that
already has a machine does not get a second one. With --keep the script waits until the run is
complete and replaces a machine that EC2 took away. Arguments after `--` are settings of
`anew train`. Needs boto3 and credentials.
"""

import hashlib
import json
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import tyro

sys.path.insert(0, str(Path(__file__).parent))
from source import source_archive

USER_DATA_SCRIPT = Path(__file__).with_name("ec2_user_data.sh")
USER_DATA_LIMIT = 16_384  # bytes that EC2 accepts as user data
# Ubuntu with NVIDIA's driver and PyTorch:
# https://docs.aws.amazon.com/dlami/latest/devguide/find-dlami-id.html
IMAGE = (
    "resolve:ssm:/aws/service/deeplearning/ami/x86_64/"
    "oss-nvidia-driver-gpu-pytorch-2.9-ubuntu-24.04/latest/ami-id"
)
# Error codes after which another zone may still have a machine.
NOT_IN_THIS_ZONE = {
    "InsufficientInstanceCapacity",
    "SpotMaxPriceTooLow",
    "Unsupported",
    "InsufficientHostCapacity",
    "InsufficientFreeAddressesInSubnet",
}
# Error codes after which the same request may succeed later.
TEMPORARY = {"RequestLimitExceeded", "InternalError", "Unavailable", "ServiceUnavailable"}
# Error codes that waiting does not change.
QUOTA_EXCEEDED = {"MaxSpotInstanceCountExceeded", "VcpuLimitExceeded", "InstanceLimitExceeded"}


@dataclass
class Options:
    """The options of this script."""

    recipe: tyro.conf.Positional[str]
    """recipe to train, e.g. gpt2-124m"""
    bucket: str
    """S3 bucket for the source and the run folder"""
    max_price: float
    """highest price in dollars an hour for the machine"""
    instance: str = "p4d.24xlarge"
    """instance type"""
    name: str = ""
    """name of the run; by default the recipe"""
    regions: list[str] = field(default_factory=lambda: ["us-east-1", "us-east-2", "us-west-2"])
    """AWS regions to search"""
    profile: str = "anew"
    """instance profile that may read and write the bucket"""
    hours: float = 48.0
    """the machine shuts itself down after this time, even if the run is not complete"""
    disk_gb: int = 200
    """disk size in GB"""
    image: str = IMAGE
    """machine image"""
    key_name: str = ""
    """key pair for ssh"""
    every: float = 60.0
    """seconds between two rounds of requests"""
    keep: bool = False
    """wait until the run is complete, and replace a machine that EC2 took away"""
    dry_run: bool = False
    """print the prices and exit"""

    @property
    def run(self) -> str:
        """Return the name of the run."""
        return self.name or self.recipe


@dataclass(frozen=True, order=True)
class Offer:
    """The spot price of the instance type in one zone."""

    price: float  # dollars an hour
    zone: str
    region: str


def main(options: Options, settings: list[str]) -> None:
    """Request machines until one starts or, with --keep, until the run is complete."""
    import boto3

    clients = {region: boto3.client("ec2", region_name=region) for region in options.regions}
    s3 = boto3.client("s3", region_name=options.regions[0])
    run = options.run
    if not options.dry_run:
        key = f"anew/{run}/source.tar.gz"
        s3.put_object(Bucket=options.bucket, Key=key, Body=source_archive())
    attempt = 0
    while True:
        if run_status(s3, options.bucket, run) == "complete":
            log(f"the run {run} is complete: s3://{options.bucket}/anew/{run}/run")
            return
        machine = running_machine(clients, run)
        if machine:
            log(f"{machine} is running {run}")
            if not options.keep:
                return
            time.sleep(options.every)
            continue
        offers = sorted(spot_offers(clients, options.instance))
        for offer in offers:
            is_too_expensive = offer.price > options.max_price
            remark = f", above ${options.max_price:.2f}" if is_too_expensive else ""
            log(f"{offer.zone}: ${offer.price:.2f} an hour{remark}")
        if options.dry_run:
            return
        if not offers:
            regions = ", ".join(options.regions)
            fail(
                f"no zone of {regions} offers {options.instance}; "
                "choose another --instance or other --regions."
            )
        attempt += 1
        affordable = [offer for offer in offers if offer.price <= options.max_price]
        if not any(
            start_machine(clients[offer.region], options, settings, offer.zone, attempt)
            for offer in affordable
        ):
            time.sleep(options.every)


def run_status(s3: Any, bucket: str, run: str) -> str:
    """Return the status in the run_state.json in the bucket, or "" if there is none."""
    from botocore.exceptions import ClientError

    try:
        answer = s3.get_object(Bucket=bucket, Key=f"anew/{run}/run/run_state.json")
        return str(json.loads(answer["Body"].read())["status"])
    except (ClientError, ValueError, KeyError):
        return ""


def running_machine(clients: dict[str, Any], run: str) -> str:
    """Return the machine that works on this run, or "": only one may write to a run folder."""
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


def spot_offers(clients: dict[str, Any], instance: str) -> list[Offer]:
    """Return the latest spot price of every zone that offers this instance type."""
    offers = []
    for region, ec2 in clients.items():
        latest: dict[str, dict[str, Any]] = {}
        pages = ec2.get_paginator("describe_spot_price_history").paginate(
            InstanceTypes=[instance], ProductDescriptions=["Linux/UNIX"], StartTime=int(time.time())
        )
        for page in pages:
            for entry in page["SpotPriceHistory"]:
                zone = entry["AvailabilityZone"]
                if zone not in latest or entry["Timestamp"] > latest[zone]["Timestamp"]:
                    latest[zone] = entry
        for zone, entry in latest.items():
            offers.append(Offer(float(entry["SpotPrice"]), zone, region))
    return offers


def start_machine(ec2: Any, options: Options, settings: list[str], zone: str, attempt: int) -> bool:
    """Request one machine in `zone`. Return False if the zone has none at the moment."""
    from botocore.exceptions import ClientError

    # The API client repeats a request whose answer is lost. With the token, EC2 then returns the
    # machine that it has started already instead of starting a second one.
    unique = f"{options.run} {zone} {attempt} {time.time():.0f}"
    token = hashlib.sha256(unique.encode()).hexdigest()[:48]
    request = spot_request(options, zone) | {
        "ClientToken": token,
        "UserData": user_data(options, settings),
    }
    try:
        [instance] = ec2.run_instances(**request)["Instances"]
    except ClientError as error:
        code = error.response["Error"]["Code"]
        message = error.response["Error"]["Message"]
        if code in QUOTA_EXCEEDED:
            fail(
                f"the quota of your account does not allow {options.instance} ({message}); "
                "ask AWS for a higher quota, or choose a smaller --instance."
            )
        if code not in NOT_IN_THIS_ZONE | TEMPORARY:
            fail(f"EC2 refused the request: {message} ({code}).")
        log(f"{zone}: {code}")
        return False
    cost = f"at most ${options.max_price:.2f} an hour for {options.hours:g} h"
    log(f"{zone}: {instance['InstanceId']} starts, {cost}")
    return True


def spot_request(options: Options, zone: str) -> dict[str, Any]:
    """Return the arguments of RunInstances for one spot machine that is tagged with the run."""
    spot = {
        "MaxPrice": f"{options.max_price:.4f}",
        "SpotInstanceType": "one-time",
        "InstanceInterruptionBehavior": "terminate",
    }
    disk = {"VolumeSize": options.disk_gb, "VolumeType": "gp3"}
    tags = [
        {"Key": "anew-run", "Value": options.run},
        {"Key": "Name", "Value": f"anew {options.run}"},
    ]
    request = {
        "ImageId": options.image,
        "InstanceType": options.instance,
        "MinCount": 1,
        "MaxCount": 1,
        "Placement": {"AvailabilityZone": zone},
        "InstanceMarketOptions": {"MarketType": "spot", "SpotOptions": spot},
        "InstanceInitiatedShutdownBehavior": "terminate",
        "IamInstanceProfile": {"Name": options.profile},
        "MetadataOptions": {"HttpTokens": "required"},
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
        "TagSpecifications": [{"ResourceType": "instance", "Tags": tags}],
    }
    if options.key_name:
        request["KeyName"] = options.key_name
    return request


def user_data(options: Options, settings: list[str]) -> str:
    """Return ec2_user_data.sh with this run's settings exported after its first line."""
    variables = {
        "ANEW_S3": f"s3://{options.bucket}/anew/{options.run}",
        "ANEW_MINUTES": str(round(options.hours * 60)),
        "ANEW_TRAIN": shlex.join([options.recipe, *settings]),
    }
    exports = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    shebang, rest = USER_DATA_SCRIPT.read_text(encoding="utf-8").split("\n", 1)
    script = "\n".join([shebang, *exports, rest])
    if len(script) > USER_DATA_LIMIT:
        fail("the settings are longer than EC2 accepts; put them into a recipe.")
    return script


def log(message: str) -> None:
    """Print a message with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {message}", flush=True)


def fail(message: str) -> NoReturn:
    """Print an error message and exit with code 2."""
    print(f"ec2: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    separator = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options = tyro.cli(Options, args=sys.argv[1:separator], description=__doc__)
    main(options, sys.argv[separator + 1 :])
