"""The least that a picker over grpc.aio can be: says the same to every call, decides and keeps nothing."""

import argparse
import asyncio
from collections.abc import AsyncIterator

import grpc
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from envoy.service.ext_proc.v3.external_processor_pb2_grpc import (
    ExternalProcessorServicer,
    add_ExternalProcessorServicer_to_server,
)

_DESTINATION = "x-gateway-destination-endpoint"


class Empty(ExternalProcessorServicer):  # type: ignore[misc]  # The package has no types.
    """Sends every call to one endpoint, and everything back as it came."""

    def __init__(self, destination: str) -> None:
        self._head = ext_proc.ProcessingResponse()
        added = self._head.request_headers.response.header_mutation.set_headers.add()
        added.header.key, added.header.raw_value = _DESTINATION, destination.encode()
        self._head.dynamic_metadata.update({"envoy.lb": {_DESTINATION: destination}})
        self._answer_head = ext_proc.ProcessingResponse(response_headers=ext_proc.HeadersResponse())

    async def Process(  # noqa: N802  # gRPC's name.
        self, requests: AsyncIterator[ext_proc.ProcessingRequest], _context: object
    ) -> AsyncIterator[ext_proc.ProcessingResponse]:
        body = b""
        async for request in requests:
            match request.WhichOneof("request"):
                case "request_body":
                    body += request.request_body.body
                    if request.request_body.end_of_stream:
                        yield self._head
                        yield _piece("request_body", body)
                case "response_headers":
                    yield self._answer_head
                case "response_body":
                    yield _piece("response_body", request.response_body.body)


def _piece(kind: str, body: bytes) -> ext_proc.ProcessingResponse:
    answer = ext_proc.ProcessingResponse()
    piece = getattr(answer, kind).response.body_mutation.streamed_response
    piece.body, piece.end_of_stream = body, True
    return answer


async def main(destination: str) -> None:
    server = grpc.aio.server()
    add_ExternalProcessorServicer_to_server(Empty(destination), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print("ready", port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--destination", required=True)
    asyncio.run(main(parser.parse_args().destination))
