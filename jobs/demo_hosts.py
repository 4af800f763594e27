"""Host names and addresses, as a server is bound to them and as clients write them."""

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether a host name or address, in brackets or not, is this machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def host_name(header: str) -> str:
    """Return a Host header without its port."""
    if header.startswith("["):
        return header.partition("]")[0]
    return header.partition(":")[0]


def page_address(host: str, port: int) -> str:
    """Return the URL of a page."""
    name = f"[{host.strip('[]')}]" if ":" in host else host
    return f"http://{name}:{port}/"
