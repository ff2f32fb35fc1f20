"""Who asks, and of what: what every route is told."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPBearer

from tav_opt.api.answers import Refused
from tav_opt.api.service import Service

_BEARER = HTTPBearer(auto_error=False, scheme_name="key", description="a key of --keys, where the API has some")


def the_service(request: Request) -> Service:
    """Of the application."""
    found: Service = request.app.state.service
    return found


TheService = Annotated[Service, Depends(the_service)]


def the_owner(request: Request, service: TheService, _described: Annotated[object, Depends(_BEARER)]) -> str:
    """Whose key the request bears; raises Refused for nobody's."""
    owner = service.keys.owner(request.headers.get("authorization"))
    if owner is None:
        told = "the key is missing or unknown: send Authorization: Bearer …"
        raise Refused(401, told, "invalid_api_key", WWW_Authenticate="Bearer")
    return owner


Owner = Annotated[str, Depends(the_owner)]
