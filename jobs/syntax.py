"""Where syntax allows a cut: function bodies and runs of statements, by tree-sitter. Nothing is fetched."""

from collections.abc import Iterator
from functools import cache
from importlib import import_module

from tree_sitter import Language, Node, Parser

LANGUAGES = {
    ".py": "python", ".pyi": "python", ".js": "javascript", ".mjs": "javascript", ".cjs": "javascript",
    ".jsx": "javascript", ".java": "java", ".go": "go", ".ts": "typescript", ".tsx": "typescript", ".c": "c", ".h": "c",
    ".cc": "cpp", ".cpp": "cpp", ".cxx": "cpp", ".hpp": "cpp", ".hh": "cpp", ".rs": "rust", ".rb": "ruby",
    ".php": "php", ".cs": "csharp", ".kt": "kotlin", ".scala": "scala", ".swift": "swift", ".sh": "shell",
    ".bash": "shell", ".lua": "lua", ".pl": "perl", ".r": "r", ".jl": "julia", ".hs": "haskell", ".ml": "ocaml",
    ".ex": "elixir", ".erl": "erlang", ".clj": "clojure", ".sql": "sql", ".html": "html", ".css": "css",
}  # fmt: skip

FUNCTIONS = {
    "python": {"function_definition"},
    "javascript": {"function_declaration", "function_expression", "method_definition", "arrow_function"},
    "java": {"method_declaration", "constructor_declaration"},
    "go": {"function_declaration", "method_declaration", "func_literal"},
}
MAX_BLOCK_LINES = 16
MAX_BLOCK_STATEMENTS = 4


@cache
def _parser(language: str) -> Parser:
    return Parser(Language(import_module(f"tree_sitter_{language}").language()))


def has_grammar(language: str) -> bool:
    """Whether function bodies and statements of a language are known."""
    return language in FUNCTIONS


def function_bodies(data: bytes, language: str) -> list[tuple[int, int]]:
    """Byte ranges of function bodies, from the first statement after a docstring to the last."""
    bodies = []
    for node in _walk(_parser(language).parse(data).root_node):
        if node.type in FUNCTIONS[language] and (body := node.child_by_field_name("body")) is not None:
            statements = _statements(body)
            if language == "python" and len(statements) > 1 and _is_docstring(statements[0]):
                statements = statements[1:]
            if statements and body.type not in ("expression",):
                bodies.append((statements[0].start_byte, statements[-1].end_byte))
    return bodies


def statement_runs(data: bytes, language: str) -> list[tuple[int, int]]:
    """Byte ranges of one to four neighbouring statements, each on lines of its own, over 2 to 16 lines."""
    runs = []
    for node in _walk(_parser(language).parse(data).root_node):
        siblings = [child for child in node.named_children if _starts_line(data, child)]
        for first in range(len(siblings)):
            for last in range(first, min(first + MAX_BLOCK_STATEMENTS, len(siblings))):
                lines = siblings[last].end_point[0] - siblings[first].start_point[0] + 1
                if 2 <= lines <= MAX_BLOCK_LINES:
                    runs.append((siblings[first].start_byte, siblings[last].end_byte))
    return sorted(set(runs))


def _walk(root: Node) -> Iterator[Node]:
    """The nodes of more than one line: no function body and no run of statements begins below another."""
    stack = [root]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(child for child in reversed(node.named_children) if child.end_point[0] > child.start_point[0])


def _statements(body: Node) -> list[Node]:
    children = [child for child in body.named_children if child.type != "comment"]
    if len(children) == 1 and children[0].type == "statement_list":
        return [child for child in children[0].named_children if child.type != "comment"]
    return children


def _is_docstring(node: Node) -> bool:
    return node.type == "expression_statement" and [c.type for c in node.named_children] == ["string"]


def _starts_line(data: bytes, node: Node) -> bool:
    line = data.rfind(b"\n", 0, node.start_byte) + 1
    return not data[line : node.start_byte].strip()
