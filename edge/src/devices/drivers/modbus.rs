//! Modbus TCP, over tokio-modbus.
//!
//! Neighbouring registers are read in one request ([`spans`]); when the device refuses a span, each address of it is
//! read alone, so that one wrong address does not spoil its neighbours.
//!
//! A reply that comes after its timeout would be taken for the next request's (tokio-modbus issue 324), so after any
//! timeout, I/O error or header mismatch the connection is reported as lost and opened anew by the caller.

use std::time::Duration;

use async_trait::async_trait;
use skerry_proto::device::{Endpoint, ModbusAddress, ModbusTable, QualityReason};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_modbus::client::{Client, Context, tcp};
use tokio_modbus::{ExceptionCode, Request, Response, Slave, slave::SlaveContext};

use super::{Batch, BusError, Driver, PointError, Raw};

/// The protocol's limit for one request of registers; bits could be 2000, but have no need of it.
const MAX_SPAN: u16 = 125;
/// Unused registers between two wanted ones that are cheaper to read than to skip.
const MAX_GAP: u16 = 0;
/// How long the opening of the connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// One Modbus TCP server or gateway.
pub(crate) struct Modbus {
    endpoint: Endpoint,
    context: Option<Context>,
}

impl Modbus {
    /// Does not connect yet.
    pub(crate) fn new(endpoint: Endpoint) -> Self {
        Self {
            endpoint,
            context: None,
        }
    }

    fn error(&self, reason: QualityReason, what: impl std::fmt::Display) -> BusError {
        BusError {
            reason,
            message: format!("modbus server {}: {what}", self.endpoint),
        }
    }

    async fn read_span(
        &mut self,
        span: ModbusAddress,
        limit: Duration,
    ) -> Result<Result<Raw, ExceptionCode>, BusError> {
        let Some(context) = self.context.as_mut() else {
            return Err(self.error(QualityReason::NotConnected, "not connected"));
        };
        let ModbusAddress {
            table,
            address,
            count,
        } = span;
        // Not by the methods of `Reader`: they assert that the server has sent as much as it was asked for.
        let request = match table {
            ModbusTable::Coil => Request::ReadCoils(address, count),
            ModbusTable::Discrete => Request::ReadDiscreteInputs(address, count),
            ModbusTable::Input => Request::ReadInputRegisters(address, count),
            ModbusTable::Holding => Request::ReadHoldingRegisters(address, count),
        };
        let answer = timeout(limit, context.call(request)).await;
        match answer {
            Ok(Ok(Err(code))) => Ok(Err(code)),
            Ok(Ok(Ok(Response::ReadCoils(bits) | Response::ReadDiscreteInputs(bits)))) => {
                Ok(Ok(Raw::Bits(bits)))
            }
            Ok(Ok(Ok(Response::ReadInputRegisters(words) | Response::ReadHoldingRegisters(words)))) => {
                Ok(Ok(Raw::Words(words)))
            }
            Ok(Ok(Ok(_))) => Err(self.error(QualityReason::CommFailure, "it answers another question")),
            Ok(Err(error)) => Err(self.error(QualityReason::CommFailure, error)),
            Err(_) => Err(self.error(QualityReason::Timeout, format_args!("no answer within {limit:?}"))),
        }
    }
}

#[async_trait]
impl Driver for Modbus {
    async fn connect(&mut self) -> Result<(), BusError> {
        self.context = None;
        let address = (self.endpoint.host.as_str(), self.endpoint.port);
        let stream = match timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Err(self.error(QualityReason::NotConnected, error)),
            Err(_) => {
                let what = format!("no connection within {CONNECT_TIMEOUT:?}");
                return Err(self.error(QualityReason::NotConnected, what));
            }
        };
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(endpoint = %self.endpoint, %error, "TCP_NODELAY is refused");
        }
        self.context = Some(tcp::attach(stream));
        Ok(())
    }

    async fn read(&mut self, batch: &Batch) -> Result<Vec<Result<Raw, PointError>>, BusError> {
        if let Some(context) = self.context.as_mut() {
            context.set_slave(Slave(batch.unit));
        }
        let mut results = vec![None; batch.addresses.len()];
        for span in spans(&batch.addresses) {
            match self.read_span(span.range, batch.timeout).await? {
                Ok(raw) => {
                    for &index in &span.members {
                        results[index] = Some(cut(&raw, span.range, batch.addresses[index]));
                    }
                }
                Err(code) if span.members.len() == 1 => {
                    for &index in &span.members {
                        results[index] = Some(Err(refusal(code, span.range)));
                    }
                }
                Err(_) => {
                    for &index in &span.members {
                        let alone = batch.addresses[index];
                        let answer = self.read_span(alone, batch.timeout).await?;
                        results[index] = Some(match answer {
                            Ok(raw) => cut(&raw, alone, alone),
                            Err(code) => Err(refusal(code, alone)),
                        });
                    }
                }
            }
        }
        let missing = || PointError {
            reason: QualityReason::CommFailure,
            message: "the address was not read".into(),
        };
        Ok(results
            .into_iter()
            .map(|result| result.unwrap_or_else(|| Err(missing())))
            .collect())
    }

    async fn close(&mut self) {
        if let Some(mut context) = self.context.take()
            && let Ok(Err(error)) = timeout(Duration::from_millis(200), context.disconnect()).await
        {
            tracing::debug!(endpoint = %self.endpoint, %error, "the connection was closed by the other side");
        }
    }
}

/// Reads registers from a server that answers with any bytes and then closes.
pub(crate) fn any_answer(bytes: &[u8]) {
    use tokio::io::AsyncWriteExt;
    /// What the pipe holds without a reader.
    const MOST: usize = 4096;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build();
    let Ok(runtime) = runtime else { return };
    runtime.block_on(async {
        let (ours, mut theirs) = tokio::io::duplex(MOST);
        // Neither blocks: the pipe is new and has room.
        let _ = theirs.write_all(&bytes[..bytes.len().min(MOST)]).await;
        let _ = theirs.shutdown().await;
        let mut modbus = Modbus::new(Endpoint {
            host: "server".to_owned(),
            port: 502,
        });
        modbus.context = Some(tcp::attach(ours));
        let address = |table| ModbusAddress {
            table,
            address: 0,
            count: 2,
        };
        let batch = Batch {
            unit: 1,
            timeout: Duration::from_secs(1),
            addresses: vec![address(ModbusTable::Holding), address(ModbusTable::Coil)],
        };
        if let Ok(answers) = modbus.read(&batch).await {
            assert_eq!(answers.len(), batch.addresses.len(), "an answer for each address");
        }
    });
}

fn refusal(code: ExceptionCode, address: ModbusAddress) -> PointError {
    use ExceptionCode::{IllegalDataAddress, IllegalDataValue, IllegalFunction};
    let (reason, remedy) = match code {
        IllegalDataAddress | IllegalDataValue => (
            QualityReason::ConfigError,
            ": check descriptor.register, address and rawType",
        ),
        IllegalFunction => (QualityReason::ConfigError, ": check descriptor.register"),
        _ => (QualityReason::CommFailure, ""),
    };
    PointError {
        reason,
        message: format!(
            "the device refuses {} {} with exception {} ({code}){remedy}",
            address.table,
            address.address,
            u8::from(code)
        ),
    }
}

fn cut(raw: &Raw, span: ModbusAddress, wanted: ModbusAddress) -> Result<Raw, PointError> {
    let start = usize::from(wanted.address - span.address);
    let range = start..start + usize::from(wanted.count);
    let part = match raw {
        Raw::Words(words) => words.get(range).map(|words| Raw::Words(words.to_vec())),
        Raw::Bits(bits) => bits.get(range).map(|bits| Raw::Bits(bits.to_vec())),
    };
    part.ok_or_else(|| PointError {
        reason: QualityReason::CommFailure,
        message: "the answer is shorter than what was asked for".into(),
    })
}

/// One request, and the addresses (by index) that it answers.
#[derive(Debug, PartialEq, Eq)]
struct Span {
    range: ModbusAddress,
    members: Vec<usize>,
}

/// Joins neighbours of one table into as few requests as [`MAX_SPAN`] allows.
fn spans(addresses: &[ModbusAddress]) -> Vec<Span> {
    let mut order: Vec<usize> = (0..addresses.len()).collect();
    order.sort_by_key(|&i| (addresses[i].table, addresses[i].address, addresses[i].count));
    let mut spans: Vec<Span> = Vec::new();
    for index in order {
        let next = addresses[index];
        let start = u32::from(next.address);
        let end = start + u32::from(next.count);
        if let Some(span) = spans.last_mut() {
            let range = span.range;
            let range_end = u32::from(range.address) + u32::from(range.count);
            let joined = range_end.max(end) - u32::from(range.address);
            let near = start <= range_end + u32::from(MAX_GAP);
            if range.table == next.table
                && near
                && let Ok(count) = u16::try_from(joined)
                && count <= MAX_SPAN
            {
                span.range.count = count;
                span.members.push(index);
                continue;
            }
        }
        spans.push(Span {
            range: next,
            members: vec![index],
        });
    }
    spans
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(table: ModbusTable, address: u16, count: u16) -> ModbusAddress {
        ModbusAddress {
            table,
            address,
            count,
        }
    }

    #[test]
    fn neighbours_are_joined_and_tables_are_not() {
        use ModbusTable::{Holding, Input};
        let found = spans(&[
            at(Input, 2, 2),
            at(Holding, 0, 1),
            at(Input, 0, 2),
            at(Input, 9, 1),
        ]);
        assert_eq!(
            found,
            [
                Span {
                    range: at(Input, 0, 4),
                    members: vec![2, 0]
                },
                Span {
                    range: at(Input, 9, 1),
                    members: vec![3]
                },
                Span {
                    range: at(Holding, 0, 1),
                    members: vec![1]
                },
            ]
        );
    }

    proptest! {
        #[test]
        fn spans_cover_every_address_once_and_keep_the_limit(list in prop::collection::vec((0..4u8, 0..400u16, 1..125u16), 0..60)) {
            use ModbusTable::{Coil, Discrete, Holding, Input};
            let tables = [Coil, Discrete, Input, Holding];
            let addresses: Vec<_> = list.iter().map(|&(t, a, c)| at(tables[usize::from(t)], a, c)).collect();
            let mut seen = vec![0; addresses.len()];
            for span in spans(&addresses) {
                prop_assert!(span.range.count <= MAX_SPAN);
                for index in span.members {
                    seen[index] += 1;
                    let one = addresses[index];
                    prop_assert_eq!(one.table, span.range.table);
                    prop_assert!(one.address >= span.range.address);
                    prop_assert!(one.address + one.count <= span.range.address + span.range.count);
                }
            }
            prop_assert!(seen.iter().all(|&n| n == 1));
        }
    }
}
