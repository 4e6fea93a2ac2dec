"""Start a SageMaker training job.

    python launch/sagemaker_start.py gpt2-124m --role ARN --bucket MINE --image URI -- --steps 19073

Arguments after `--` are settings of `anew train`. The image is one of AWS's PyTorch training
containers (https://docs.aws.amazon.com/deep-learning-containers/), or any image with PyTorch and
`sagemaker-training`. A job with the --name of an earlier job continues from the checkpoints in the
bucket. Needs boto3 and credentials.
"""

import datetime
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).parent))
from source import source_archive


@dataclass
class Options:
    """The options of this script."""

    recipe: tyro.conf.Positional[str]
    """recipe to train, e.g. gpt2-124m"""
    role: str
    """ARN of the role that SageMaker assumes; it must be able to read and write the bucket"""
    bucket: str
    """S3 bucket for the source, the checkpoints and the model"""
    image: str
    """training container"""
    instance: str = "ml.g5.12xlarge"
    """instance type"""
    count: int = 1
    """number of machines"""
    hours: float = 24.0
    """the job is stopped after this time; with --spot it may wait as long again for machines"""
    spot: bool = False
    """use spare capacity at about a third of the price; SageMaker restarts an interrupted job"""
    disk_gb: int = 200
    """disk size of each machine in GB"""
    name: str = ""
    """name of the run; by default the recipe"""
    data: str = ""
    """s3://... of a data folder; without it the job downloads the recipe's source"""
    processes: int = 0
    """processes on each machine; 0: one for each GPU"""
    region: str | None = None
    """AWS region; by default that of the credentials"""


def start_job(options: Options, settings: list[str]) -> str:
    """Upload this repository and start a training job with it. Return the job's name."""
    import boto3

    run = options.name or options.recipe
    s3 = boto3.client("s3", region_name=options.region)
    key = f"anew/{run}/source.tar.gz"
    s3.put_object(Bucket=options.bucket, Key=key, Body=source_archive())
    hyperparameters = {
        **as_hyperparameters(settings),
        "recipe": options.recipe,
        "sagemaker_program": "launch/sagemaker.py",
        "sagemaker_submit_directory": f"s3://{options.bucket}/{key}",
        "sagemaker_region": s3.meta.region_name,
    }
    if options.processes:
        hyperparameters.setdefault("processes", str(options.processes))
    request = job_request(options, f"s3://{options.bucket}/anew/{run}")
    request["HyperParameters"] = hyperparameters
    request["TrainingJobName"] = f"{run}-{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}"
    sagemaker = boto3.client("sagemaker", region_name=options.region)
    sagemaker.create_training_job(**request)
    return str(request["TrainingJobName"])


def job_request(options: Options, run_url: str) -> dict[str, Any]:
    """Return the arguments of CreateTrainingJob, except the job's name and hyperparameters."""
    seconds = int(options.hours * 3600)
    stopping_condition = {"MaxRuntimeInSeconds": seconds}
    if options.spot:
        stopping_condition["MaxWaitTimeInSeconds"] = 2 * seconds
    request: dict[str, Any] = {
        "RoleArn": options.role,
        "AlgorithmSpecification": {"TrainingImage": options.image, "TrainingInputMode": "File"},
        "ResourceConfig": {
            "InstanceType": options.instance,
            "InstanceCount": options.count,
            "VolumeSizeInGB": options.disk_gb,
        },
        "CheckpointConfig": {"S3Uri": f"{run_url}/checkpoints"},
        "OutputDataConfig": {"S3OutputPath": f"{run_url}/output"},
        "StoppingCondition": stopping_condition,
        "EnableManagedSpotTraining": options.spot,
    }
    if options.data:
        source = {
            "S3DataType": "S3Prefix",
            "S3Uri": options.data,
            "S3DataDistributionType": "FullyReplicated",
        }
        channel = {"ChannelName": "training", "DataSource": {"S3DataSource": source}}
        request["InputDataConfig"] = [channel]
    return request


def as_hyperparameters(settings: list[str]) -> dict[str, str]:
    """Convert flags of `anew train` to hyperparameters, whose values are strings."""
    hyperparameters: dict[str, str] = {}
    name = ""  # the flag that the next word is a value of
    for word in settings:
        if word.startswith("--"):
            flag, _, value = word[2:].partition("=")
            name = flag.replace("-", "_")
            hyperparameters[name] = value or "true"
        elif name:
            hyperparameters[name] = word
            name = ""
        else:
            sys.exit(
                f"sagemaker_start: '{word}' is not a setting; write --NAME VALUE after the `--`."
            )
    return hyperparameters


if __name__ == "__main__":
    separator = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options = tyro.cli(Options, args=sys.argv[1:separator], description=__doc__)
    print(start_job(options, sys.argv[separator + 1 :]))
