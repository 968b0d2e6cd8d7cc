"""A Modbus TCP server for the sandbox and the tests, made of pymodbus.

    modbus_server.py HOST PORT TABLE:ADDRESS=VALUE[,VALUE...] ...

TABLE is input, holding, coil or discrete. Registers that are not given do not exist: reading one is answered with
exception 2. Prints "ready PORT" when it listens; PORT 0 takes a free one.
"""

import asyncio
import sys

try:
    import pymodbus
    from pymodbus.server import ModbusTcpServer
    from pymodbus.simulator import DataType, SimData, SimDevice
except ImportError as error:
    sys.exit(f"modbus_server.py needs pymodbus 3.16 (pip install 'pymodbus==3.16.*'): {error}")

TABLES = ("coil", "discrete", "holding", "input")


def blocks(words):
    """Reads TABLE:ADDRESS=VALUES words into pymodbus's four blocks."""
    found = {table: [] for table in TABLES}
    for word in words:
        place, _, values = word.partition("=")
        table, _, address = place.partition(":")
        if table not in found or not address.isdigit() or not values:
            sys.exit(f"modbus_server.py: {word!r} is not TABLE:ADDRESS=VALUE[,VALUE...]")
        numbers = [int(value, 0) for value in values.split(",")]
        if table in ("coil", "discrete"):
            data = SimData(int(address), values=[bool(n) for n in numbers], datatype=DataType.BITS)
        else:
            data = SimData(int(address), values=[n & 0xFFFF for n in numbers], datatype=DataType.REGISTERS)
        found[table].append(data)
    # pymodbus wants every block to hold something; this far end of it is in nobody's way.
    for table, block in found.items():
        if not block:
            bits = table in ("coil", "discrete")
            datatype = DataType.BITS if bits else DataType.REGISTERS
            block.append(SimData(65000, values=[False] * 16 if bits else 0, datatype=datatype))
    return tuple(found[table] for table in TABLES)


async def main():
    """Serves until it is killed."""
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    host, port = sys.argv[1], int(sys.argv[2])
    server = ModbusTcpServer(SimDevice(id=1, simdata=blocks(sys.argv[3:])), address=(host, port))
    await server.serve_forever(background=True)
    port = server.transport.sockets[0].getsockname()[1]
    print(f"ready {port}", flush=True)
    await asyncio.Event().wait()


asyncio.run(main())
