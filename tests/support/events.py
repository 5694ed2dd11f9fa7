"""What a peer has told by its events."""

from migrationd.ctl.peer_process import PeerProcess


def statuses(peer: PeerProcess) -> list[str]:
    """Statuses of MIGRATION events, in order."""
    return [
        str(event["data"]["status"])  # type: ignore[index]
        for event in peer.events
        if event["event"] == "MIGRATION"
    ]
