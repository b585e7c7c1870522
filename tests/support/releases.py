"""One module of a made-up SGLang, and what later releases make of it."""

from __future__ import annotations

CODE = '''\
class Thing:
    size: int = 0
    def hooked(self, one):
        """Says what it is."""
        a = one
        b = a
        return b
    def called(self, *, key):
        return key
    def shared(self): ...
    def fresh(self): ...
'''

# The same code with comments, a docstring of other words and another layout.
SAME = (
    CODE.replace('"""Says what it is."""', '"""Says it\n        better."""')
    .replace("        b = a\n", "        b = (  # why\n            a\n        )\n")
    .replace("def shared(self): ...", "def shared(self):\n        ...")
)

OTHER = CODE.replace("        b = a\n", "        b = a + 1\n        print(b)\n")

OLD = CODE.replace("    def fresh(self): ...\n", "") + "def aside(one): ...\n"

WITHOUT = CODE.replace("    size: int = 0\n", "")

UNSHARED = CODE.replace("    def shared(self): ...\n", "")
