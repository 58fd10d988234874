"""Reads the arguments, runs the command, and says in a sentence what went wrong.

An option that has a variable of the environment is stored under the variable's name, and wins over it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Mapping

from api import __version__, logs
from api.errors import ApiError
from api.settings import Settings, SettingsError

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
_RUNS = ("serve", "runpod", "start")
"""Commands that run until they are told to end, and log what they do."""
_IS_USAGE = ("INVALID_INPUTS", "NO_MODEL_ID")
# what says which weights are meant; as long as the model is the one of the environment, the rest comes from there
_OF_A_MODEL = ("HF_MODEL_ID", "MODEL_REVISION", "MODEL_URL", "CHECKPOINT_URL", "CHECKPOINT_CONFIG_URL")
_NAMES_ITSELF = ("HF_MODEL_ID", "MODEL_URL", "CHECKPOINT_URL")


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0, 1 when it failed, 2 when it was not called rightly, 130 when it was interrupted.
    """
    args = _parser().parse_args(arguments)
    try:
        settings = Settings.from_env(environment(os.environ, options(args)))
        if args.command not in _RUNS:
            logs.configure(settings.log_format or "text", "debug" if settings.log_level == "debug" else "warning")
        module, _, name = args.run.partition(":")
        return int(getattr(importlib.import_module(f"api.cli.{module}"), name)(settings, args))
    except SettingsError as fault:
        _say(f"The environment has values that cannot be used: {fault}")
        return USAGE
    except ApiError as error:
        _say(sentence(error))
        return USAGE if error.code in _IS_USAGE or args.command in _RUNS else FAILED
    except BrokenPipeError:
        # whoever read our output has seen enough; without this Python complains when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as fault:
        where = f" ({fault.filename})" if fault.filename else ""
        _say(f"{fault.strerror or fault}{where}.")
        return FAILED
    except KeyboardInterrupt:
        _say("\nStopped." + (" The same command goes on where this one ended." if args.resumable else ""))
        # threads may wait for a server that does not answer; nothing they do is harmed by ending now
        sys.stdout.flush()
        os._exit(INTERRUPTED)
    except Exception as fault:
        if os.environ.get("LOG_LEVEL") == "debug":
            _say(traceback.format_exc())
        _say(
            f"This failed in a way that is not known here, LOG_LEVEL=debug shows where: {type(fault).__name__}: {fault}"
        )
        return FAILED


def sentence(error: ApiError) -> str:
    """What an error says, with what there is instead."""
    there = [str(name) for name in error.available or ()]
    return error.message + (f" There are: {', '.join(there)}." if there else "")


def options(args: argparse.Namespace) -> dict[str, str]:
    """The options that were given and have a variable, by its name."""
    return {name: str(value) for name, value in vars(args).items() if name.isupper() and value is not None}


def environment(environ: Mapping[str, str], given: Mapping[str, str]) -> dict[str, str]:
    """The environment as a command sees it.

    Args:
        environ: the environment.
        given: options by the name of the variable that they win over.
    """
    values = dict(environ)
    if "MODEL_ID" in given and given["MODEL_ID"] != environ.get("MODEL_ID"):
        # the environment's other values are about its own model
        values |= dict.fromkeys(_OF_A_MODEL, "")
    elif not environ.get("MODEL_ID") and any(given.get(name) for name in _NAMES_ITSELF):
        values["MODEL_ID"] = ""  # it is not the bundled model that lies there: the name comes from the source
    if "MODELS_DIR" in given:
        # what lies elsewhere does not count
        values |= {"BAKED_MODELS_DIR": given["MODELS_DIR"], "LOCAL_MODELS": "", "HUB_CACHES": ""}
    return values | dict(given)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(logs.Redactor(os.environ)(text), file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m api", description="One container that serves every diffusers model."
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.set_defaults(resumable=False)
    commands = parser.add_subparsers(dest="command", required=True)

    serve = commands.add_parser("serve", help="start the server", description="Start the server.")
    serve.add_argument("--host", dest="HOST", help="address to listen on (HOST)")
    serve.add_argument("--port", dest="PORT", help="port to listen on (PORT)")
    serve.add_argument("--model-id", dest="MODEL_ID", help="the default model (MODEL_ID)")
    serve.set_defaults(run="serve:serve")

    runpod = commands.add_parser(
        "runpod",
        help="be a RunPod serverless worker",
        description="Take jobs from RunPod's serverless platform, through its own SDK.",
    )
    runpod.add_argument("--test_input", metavar="JSON", help='run one job here and end: {"input": {"prompt": …}}')
    runpod.set_defaults(run="runpod:runpod")

    start = commands.add_parser(
        "start",
        help="serve, or be a RunPod serverless worker",
        description="What the image starts: a worker where RunPod hands out jobs, else the server.",
    )
    start.set_defaults(run="start:start", test_input=None)

    about = "Bring a model here, unless it is here. Without arguments: MODEL_ID and WARM_MODELS."
    download = commands.add_parser(
        "download",
        help="bring a model here",
        description=f"{about} What is left out comes from the environment.",
    )
    _name_a_model(download)
    download.set_defaults(run="download:download", resumable=True)

    models = commands.add_parser("models", help="list, show, verify, rm, push, pull", description="The models here.")
    models.set_defaults(run="models:list_models", json=False)
    verbs = models.add_subparsers(dest="verb")

    verb = verbs.add_parser("list", help="list the models that are here (the same as no word)")
    verb.add_argument("--json", action="store_true", help="for programs")
    verb.set_defaults(run="models:list_models")

    verb = verbs.add_parser("show", help="show what a model consists of and where it came from")
    verb.add_argument("model", metavar="ID_OR_KEY")
    verb.add_argument("--json", action="store_true", help="for programs")
    verb.set_defaults(run="models:show")

    verb = verbs.add_parser("verify", help="read models from end to end and compare them with their hashes")
    verb.add_argument("models", metavar="ID_OR_KEY", nargs="*", help="without any: every installed model")
    verb.set_defaults(run="models:verify")

    verb = verbs.add_parser("rm", help="remove models from MODELS_DIR")
    verb.add_argument("models", metavar="ID_OR_KEY", nargs="+")
    verb.add_argument("-y", "--yes", action="store_true", help="do not ask")
    verb.set_defaults(run="models:remove")

    verb = verbs.add_parser("push", help="upload a model to S3", description="Upload a model that is here to S3.")
    verb.add_argument("model", metavar="ID_OR_KEY")
    verb.add_argument(
        "url", metavar="S3_URL", help="a folder (s3:///bucket/name/) or a .tar.zst; what it leaves out is AWS_S3_…"
    )
    verb.set_defaults(run="models:push")

    verb = verbs.add_parser(
        "pull",
        help="ask the source again and bring what it has today",
        description="Ask a model's source what it has today, and bring that: the way to follow a branch that moved on.",
    )
    _name_a_model(verb)
    verb.set_defaults(run="download:pull", resumable=True)
    return parser


def _name_a_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("MODEL_ID", nargs="?", help="org/name (MODEL_ID)")
    add("--hf-model-id", dest="HF_MODEL_ID", metavar="ID", help="its id on the hub, where it is another")
    add("--revision", dest="MODEL_REVISION", metavar="REV", help="branch, tag or commit (MODEL_REVISION)")
    add(
        "--precision",
        dest="MODEL_PRECISION",
        choices=("fp32", "fp16", "bf16"),
        help="which weights to prefer (MODEL_PRECISION)",
    )
    add(
        "--url",
        dest="MODEL_URL",
        metavar="URL",
        help="where it lies, or is to be kept: s3://… or https://… (MODEL_URL)",
    )
    add("--checkpoint-url", dest="CHECKPOINT_URL", metavar="URL", help="a single file to convert")
    add("--checkpoint-config-url", dest="CHECKPOINT_CONFIG_URL", metavar="CONFIG", help="how that file is built")
    add("--into", dest="MODELS_DIR", metavar="FOLDER", help="where to put it (MODELS_DIR)")
    add(
        "--no-upload",
        dest="upload",
        action="store_false",
        help="do not upload to MODEL_URL what was not there and was fetched elsewhere",
    )
