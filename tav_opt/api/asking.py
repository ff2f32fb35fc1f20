"""Who asks, and of what: what every route is told."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.security import HTTPBearer

from tav_opt.api.answers import Refused
from tav_opt.api.service import Service
from tav_opt.loopback import is_loopback

_BEARER = HTTPBearer(auto_error=False, scheme_name="key", description="a key of --keys, where the API has some")


def the_service(request: Request) -> Service:
    """Of the application."""
    found: Service = request.app.state.service
    return found


TheService = Annotated[Service, Depends(the_service)]


def known_query(request: Request) -> None:
    """Raises Refused for a parameter that the route does not have."""
    known = [parameter.alias for parameter in request.scope["route"].dependant.query_params]
    if unknown := sorted(set(request.query_params) - set(known)):
        raise Refused(400, f"{unknown[0][:63]!r} is no parameter here; there are: {', '.join(known) or 'none'}")


def the_owner(request: Request, service: TheService, _described: Annotated[object, Depends(_BEARER)]) -> str:
    """Whose key the request bears; raises Refused for nobody's, and where there are none for pages of other sites."""
    if not service.keys.needed and not _is_of_this_machine(request):
        raise Refused(403, "a page of another site asks, or by another name than this machine's: that takes --keys")
    owner = service.keys.owner(request.headers.get("authorization"))
    if owner is None:
        told = "the key is missing or unknown: send Authorization: Bearer …"
        raise Refused(401, told, "invalid_api_key", WWW_Authenticate="Bearer")
    return owner


def _is_of_this_machine(request: Request) -> bool:
    """Whether it asks by a name of this machine's, and so does the page that it is of, where it is of one."""
    origin = request.headers.get("origin")
    try:
        hosts = [request.url.hostname, *([] if origin is None else [urlsplit(origin).hostname])]
    except ValueError:
        return False
    return all(is_loopback(host or "none") for host in hosts)


Owner = Annotated[str, Depends(the_owner)]
