"""What a line of a chat that begins with a slash does."""

from __future__ import annotations

from pathlib import Path

from flexgen_bench.chat.conversation import Conversation
from flexgen_bench.core.errors import unknown_choice
from flexgen_bench.core.folders import expanded

COMMANDS = {
    "/system": "TEXT: begin anew, the model is told TEXT first",
    "/reset": "begin anew",
    "/save": "FILE: write the conversation as JSON",
    "/stats": "what the answers took",
    "/help": "these commands; to write several lines end all but the last with a backslash",
    "/quit": "end (Ctrl-D does, too)",
}


def is_command(line: str) -> bool:
    return line.startswith("/")


def run_command(line: str, conversation: Conversation) -> str | None:
    """What to say about it; None: the chat is over. UserError for what is no command."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/system":
        conversation.reset(rest)
        return "begun anew"
    if name == "/reset":
        conversation.reset()
        return "begun anew"
    if name == "/save":
        path = expanded(rest or "chat.json", "/save")
        conversation.save(Path(path))
        return f"written to {path}"
    if name == "/stats":
        kept = (
            ""
            if conversation.keeps
            else "\nearlier turns are computed again: their cache is not where layers are computed"
        )
        return ("\n".join(map(str, conversation.stats)) or "no answer yet") + kept
    if name == "/help":
        return "\n".join(f"{command:<8} {what}" for command, what in COMMANDS.items())
    if name == "/quit":
        return None
    raise unknown_choice("command", name, COMMANDS)
