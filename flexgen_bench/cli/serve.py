"""``flexgen-bench serve model=smollm2``: an HTTP server in OpenAI's form.

Exit status: 0 after Ctrl-C or SIGTERM, 1 if something went wrong, 2 for bad input.
"""

from __future__ import annotations

import argparse
import ipaddress
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields

from flexgen_bench.cli.ending import FAILED, status_of
from flexgen_bench.cli.model_words import check_words, divided, number, open_llm, words_help
from flexgen_bench.core.errors import CannotRun, StoreError, UserError
from flexgen_bench.core.extras import how_to_install
from flexgen_bench.core.folders import make_writable, path_argument
from flexgen_bench.serve.settings import NUMBERS, ServeSettings, read_keys

_DEFAULTS = {f.name: f.default for f in fields(ServeSettings)}
_WHAT = {
    "sequences": "answered at once",
    "queue": "more that may wait; others are told to come back (429)",
    "prompt_tokens": "most tokens of a prompt",
    "answer_tokens": "most new tokens of an answer",
    "kept_tokens": "that stay when their request has ended, for others that begin alike (0: none)",
    "body_bytes": "most bytes of a request",
    "file_bytes": "most bytes of a file for a batch",
    "request_s": "most seconds of an answer, from its arrival",
    "stop_s": "most seconds for what is under way after Ctrl-C",
}
_EPILOG = "\n".join(
    [
        "words:",
        words_help(),
        f"  {'name=':<17} how requests call the model (default: as model= does)",
        *(f"  {key + '=':<17} {_WHAT[key]} (default: {_DEFAULTS[key]})" for key in NUMBERS),
    ]
)


def main(arguments: Sequence[str]) -> int:
    """The exit status."""
    return status_of(lambda: _command(arguments), (StoreError, CannotRun), interrupted="")


def _command(arguments: Sequence[str]) -> int:
    others, words = divided(arguments)
    options = _parser().parse_args(others)
    check_words(words, (*NUMBERS, "name"))
    return _run(options, words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flexgen-bench serve",
        description="Serve a model over HTTP in OpenAI's form: completions, chats, files and batches.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: this machine alone")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--keys", type=path_argument, default=None, metavar="FILE", help="who may ask: a key a line")
    parser.add_argument("--open-to-all", action="store_true", help="serve other machines without keys")
    parser.add_argument(
        "--state",
        type=path_argument,
        default=ServeSettings.state_dir,
        metavar="FOLDER",
        help=f"files and batches (default: {ServeSettings.state_dir})",
    )
    return parser


def _run(options: argparse.Namespace, words: Mapping[str, str]) -> int:
    settings = _settings(options, words)
    try:
        import uvicorn

        from flexgen_bench.serve.app import make_app
        from flexgen_bench.serve.files import claimed
    except ImportError as error:
        raise CannotRun(how_to_install(error.name or "fastapi")) from error
    with claimed(settings.state_dir), open_llm(words) as llm:
        llm.check_open_jobs()
        most = llm.shape.max_positions
        if settings.prompt_tokens + settings.answer_tokens - 1 > most:
            raise UserError(
                "prompt_tokens",
                f"{settings.prompt_tokens}, and answer_tokens {settings.answer_tokens}",
                f"together at most {most + 1} for {llm.shape.name}",
            )
        name = words.get("name", words["model"])
        app = make_app(llm, name, settings)
        print(f"serving {name} on http://{options.host}:{options.port}/v1", file=sys.stderr, flush=True)
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                host=options.host,
                port=options.port,
                log_level="warning",
                timeout_graceful_shutdown=settings.stop_s,
                timeout_keep_alive=30,
                server_header=False,
            )
        )
        try:
            server.run()
        except KeyboardInterrupt:
            pass  # uvicorn has shut down and tells the signal on
        except SystemExit as error:  # a port that is taken
            return FAILED if error.code else 0
    return 0 if server.started else FAILED


def _settings(options: argparse.Namespace, words: Mapping[str, str]) -> ServeSettings:
    given = {}
    for key in NUMBERS:
        if key in words:
            value = number(words[key])
            if not isinstance(value, int):
                raise UserError(key, words[key], "an integer")
            given[key] = value
    keys = () if options.keys is None else read_keys(options.keys)
    if not keys and not options.open_to_all and not _is_loopback(options.host):
        raise UserError(
            "--host",
            options.host,
            "this machine's own address (127.0.0.1) for a server without keys",
            "Give --keys FILE, or --open-to-all.",
        )
    if not 0 <= options.port < 2**16:
        raise UserError("--port", options.port, "from 0 to 65535")
    return ServeSettings(**given, keys=keys, state_dir=make_writable(options.state, "--state"))


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
