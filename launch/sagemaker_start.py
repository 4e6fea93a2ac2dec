"""Start a SageMaker training job.

    python launch/sagemaker_start.py gpt2-124m --role ARN --bucket MINE --image URI --instance ml.p4d.24xlarge --spot -- --save-minutes 5

What stands behind `--` are settings of `anew train`. The image is one of AWS's PyTorch training containers
(https://docs.aws.amazon.com/deep-learning-containers/), or any with PyTorch and `sagemaker-training`. A job with the same --name goes
on from the checkpoints in the bucket. Needs boto3 and credentials.
"""

import datetime
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).parent))
from source import archive


@dataclass
class Job:
    """A training job."""

    recipe: tyro.conf.Positional[str]
    """what to train, e.g. gpt2-124m"""
    role: str
    """ARN of the role that SageMaker takes on; it has to read and write the bucket"""
    bucket: str
    """S3 bucket for source, checkpoints and model"""
    image: str
    """training container"""
    instance: str = "ml.g5.12xlarge"
    """kind of machine"""
    count: int = 1
    """how many machines"""
    hours: float = 24.0
    """the job is stopped after this long; with --spot it may wait for machines as long again"""
    spot: bool = False
    """take spare capacity, at about a third of the price; an interrupted job goes on by itself"""
    disk_gb: int = 200
    """disk of each machine"""
    name: str = ""
    """name of the run; by default the recipe"""
    data: str = ""
    """s3://... of a data folder; without it the recipe's source is downloaded"""
    processes: int = 0
    """how many a machine; 0: one a GPU"""
    region: str | None = None
    """AWS region; by default that of the credentials"""


def start(job: Job, settings: list[str]) -> str:
    """Upload this repository and start a training job with it; returns the job's name."""
    import boto3

    run = job.name or job.recipe
    unique = f"{run}-{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}"
    s3, sagemaker = (
        boto3.client(service, region_name=job.region) for service in ("s3", "sagemaker")
    )
    place = f"s3://{job.bucket}/anew/{run}"
    s3.put_object(Bucket=job.bucket, Key=f"anew/{run}/source.tar.gz", Body=archive())
    seconds = int(job.hours * 3600)
    request: dict[str, Any] = {
        "TrainingJobName": unique,
        "RoleArn": job.role,
        "AlgorithmSpecification": {"TrainingImage": job.image, "TrainingInputMode": "File"},
        "HyperParameters": {
            **({"processes": str(job.processes)} if job.processes else {}),
            **hyperparameters(settings),
            "recipe": job.recipe,
            "sagemaker_program": "launch/sagemaker.py",
            "sagemaker_submit_directory": f"{place}/source.tar.gz",
            "sagemaker_region": s3.meta.region_name,
        },
        "ResourceConfig": {
            "InstanceType": job.instance,
            "InstanceCount": job.count,
            "VolumeSizeInGB": job.disk_gb,
        },
        "CheckpointConfig": {"S3Uri": f"{place}/checkpoints"},
        "OutputDataConfig": {"S3OutputPath": f"{place}/output"},
        "StoppingCondition": {
            "MaxRuntimeInSeconds": seconds,
            **({"MaxWaitTimeInSeconds": 2 * seconds} if job.spot else {}),
        },
        "EnableManagedSpotTraining": job.spot,
    }
    if job.data:
        where = {
            "S3DataType": "S3Prefix",
            "S3Uri": job.data,
            "S3DataDistributionType": "FullyReplicated",
        }
        request["InputDataConfig"] = [
            {"ChannelName": "training", "DataSource": {"S3DataSource": where}}
        ]
    sagemaker.create_training_job(**request)
    return unique


def hyperparameters(settings: list[str]) -> dict[str, str]:
    """Flags of `anew train` as hyperparameters, which are text."""
    found: dict[str, str] = {}
    name = ""
    for word in settings:
        if word.startswith("--"):
            flag, _, value = word[2:].partition("=")
            name = flag.replace("-", "_")
            found[name] = value or "true"
        elif name:
            found[name], name = word, ""
        else:
            sys.exit(f"sagemaker_start: '{word}' is no setting; write --NAME VALUE behind the --.")
    return found


if __name__ == "__main__":
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    print(start(tyro.cli(Job, args=sys.argv[1:cut], description=__doc__), sys.argv[cut + 1 :]))
