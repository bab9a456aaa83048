"""The rights of a key on personas, as routes and jobs check them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from masquerade.errors import InvalidKey, PersonaForbidden, ScopeMissing
from masquerade.keys import Key
from masquerade.keys import Scope as KeyScope
from masquerade.keys.ring import Keyring

LOCAL = "local"  # the owner of everything in a store without keys


@dataclass(frozen=True)
class Rights:
    """The rights of a key. None, in a store without keys, has all rights.

    Two checks use the key's list of personas. To use a persona (chat, tokens, descriptions), the requested name must be
    on the list: an alias on the list permits the use of its persona. To manage a persona (all that returns or changes a
    mask or a name), the persona's own name must be on the list as well.
    """

    key: Key | None

    def may(self, scope: KeyScope) -> bool:
        """Whether the key has a scope."""
        return self.key is None or self.key.may(scope)

    def sees(self, persona: str) -> bool:
        """Whether the key's list permits a name."""
        return self.key is None or self.key.allows(persona)

    def check_scope(self, scope: KeyScope, what: str = "this", param: str | None = None) -> None:
        """Raises `ScopeMissing`, whose message says that `what` needs the scope."""
        if not self.may(scope):
            raise ScopeMissing(f"{what} needs a key with the scope `{scope}`", param=param)

    def check_persona(self, reference: str, param: str | None = None) -> None:
        """Raises `PersonaForbidden` unless the key may use a persona. `reference` is a name, `name@digest` or an alias.

        The registry is not read: the error is the same whether or not the persona exists.
        """
        name = reference.partition("@")[0]
        if not self.sees(name):
            raise PersonaForbidden(f"this key may not use the name {name!r:.80}", param=param)

    def check_managed(self, reference: str, aliases: Mapping[str, str], param: str | None = None) -> str:
        """Raises `PersonaForbidden` unless the key may manage a persona. Returns the reference without aliases.

        Callers must use the returned reference: an alias may point to another persona later.
        """
        self.check_persona(reference, param)
        name, at, prefix = reference.partition("@")
        own = aliases.get(name, name)
        if not self.sees(own):
            raise PersonaForbidden(
                f"this key may use the persona behind the alias {name!r:.80}, but not manage it", param=param
            )
        return f"{own}{at}{prefix}"


def find_rights(owner: str, keyring: Keyring) -> Rights:
    """The present rights of a job's owner.

    Raises `InvalidKey` for a key that is no longer valid, and for a job from before the store had keys.
    """
    if not len(keyring):
        return Rights(None)
    if owner == LOCAL:
        raise InvalidKey("the job was queued without a key, and the server has keys now")
    return Rights(keyring.check(owner))
