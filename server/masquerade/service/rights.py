"""What a key may do with which personas: the one check of every route and of every job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from masquerade.errors import InvalidKey, PersonaForbidden, ScopeMissing
from masquerade.keys import Key, Keyring
from masquerade.keys import Scope as KeyScope

LOCAL = "local"  # the owner of everything while there are no keys


@dataclass(frozen=True)
class Rights:
    """What a key may do. Without a key, in a store that has none, all is allowed.

    A key's list of personas is checked in two ways. To use a persona (chat, tokens, descriptions) the name that was
    asked for must be on the list, so an alias on the list lets its key use the persona behind it. Whatever yields or
    changes a mask or a name manages the persona: the name is resolved, and the persona's own name must be on the list
    too.
    """

    key: Key | None

    def may(self, scope: KeyScope) -> bool:
        """Whether the key has a scope."""
        return self.key is None or self.key.may(scope)

    def sees(self, persona: str) -> bool:
        """Whether a persona of this name is on the key's list."""
        return self.key is None or self.key.allows(persona)

    def check_scope(self, scope: KeyScope, what: str = "this", param: str | None = None) -> None:
        """Raises `ScopeMissing`, which names what needs the scope."""
        if not self.may(scope):
            raise ScopeMissing(f"{what} needs a key with the scope `{scope}`", param=param)

    def check_persona(self, reference: str, param: str | None = None) -> None:
        """Whether a persona may be used. Raises `PersonaForbidden` for a name (`name`, `name@digest`, an alias) that is
        not on the key's list.

        Nothing is looked up: the refusal is the same whether or not there is such a persona.
        """
        name = reference.partition("@")[0]
        if not self.sees(name):
            raise PersonaForbidden(f"this key may not use the name {name!r:.80}", param=param)

    def check_managed(self, reference: str, aliases: Mapping[str, str], param: str | None = None) -> str:
        """Whether a persona may be managed; the reference with the persona's own name in place of an alias.

        Act on what this returns: an alias may mean another persona by the time it is resolved again. Raises
        `PersonaForbidden` if the name that was asked for, or what it stands for, is not on the key's list.
        """
        self.check_persona(reference, param)
        name, at, prefix = reference.partition("@")
        own = aliases.get(name, name)
        if not self.sees(own):
            raise PersonaForbidden(
                f"this key may use the persona behind the alias {name!r:.80}, and no more", param=param
            )
        return f"{own}{at}{prefix}"


def find_rights(owner: str, keyring: Keyring) -> Rights:
    """What the owner of a job may do now. Raises `InvalidKey` if its key opens nothing any more, and for a job that was
    queued without a key by the time the store has keys.
    """
    if not len(keyring):
        return Rights(None)
    if owner == LOCAL:
        raise InvalidKey("the job was queued without a key, and the server has keys by now")
    return Rights(keyring.check(owner))
