//! TCP to a name: looked up anew each time, all its addresses tried.
//!
//! Source: Happy Eyeballs (RFC 8305) without its DNS part: addresses take turns by family, each starts when the one before has failed or has had
//! [`STAGGER`], the first that connects wins.

use std::net::SocketAddr;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::net::TcpStream;

/// Head start of an address over the next.
const STAGGER: Duration = Duration::from_millis(250);
/// Most addresses that are tried.
const MOST: usize = 16;

/// Connects to a host and port. The error is for a person.
pub(super) async fn connect(host: &str, port: u16) -> Result<TcpStream, String> {
    let found = tokio::net::lookup_host((host.trim_matches(['[', ']']), port)).await;
    let found = found.map_err(|e| format!("the name {host} cannot be looked up: {e}"))?;
    let addresses = in_turns(found);
    if addresses.is_empty() {
        return Err(format!("the name {host} has no address"));
    }
    race(&addresses, TcpStream::connect).await
}

/// IPv6 and IPv4 alternate, each in the order of the answer, which is the system's.
fn in_turns(found: impl Iterator<Item = SocketAddr>) -> Vec<SocketAddr> {
    let (mut six, mut four): (Vec<_>, Vec<_>) = found.partition(SocketAddr::is_ipv6);
    six.reverse();
    four.reverse();
    let mut turns = Vec::new();
    while turns.len() < MOST && !(six.is_empty() && four.is_empty()) {
        turns.extend(six.pop());
        turns.extend(four.pop());
    }
    turns.dedup();
    turns
}

/// The first that connects; else the errors of all.
async fn race<T, F>(addresses: &[SocketAddr], connect: impl Fn(SocketAddr) -> F) -> Result<T, String>
where
    F: Future<Output = std::io::Result<T>>,
{
    let mut waiting = addresses.iter().copied();
    let mut attempts = FuturesUnordered::new();
    let mut failures = Vec::new();
    let attempt = |address| {
        let connecting = connect(address);
        async move { (address, connecting.await) }
    };
    attempts.extend(waiting.next().map(attempt));
    loop {
        let turn = tokio::time::sleep(STAGGER);
        tokio::select! {
            ended = attempts.next() => match ended {
                Some((_, Ok(connected))) => return Ok(connected),
                Some((address, Err(error))) => {
                    failures.push(format!("{address}: {error}"));
                    attempts.extend(waiting.next().map(attempt));
                }
                None => return Err(failures.join("; ")),
            },
            () = turn, if waiting.len() > 0 => attempts.extend(waiting.next().map(attempt)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Error, ErrorKind};

    use tokio::time::Instant;

    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn families_take_turns() {
        let found = ["1.1.1.1:1", "1.1.1.2:1", "[::1]:1", "1.1.1.3:1"].map(address);
        let expected = ["[::1]:1", "1.1.1.1:1", "1.1.1.2:1", "1.1.1.3:1"].map(address);
        assert_eq!(in_turns(found.into_iter()), expected);
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_that_does_not_answer_costs_a_quarter_of_a_second_and_one_that_refuses_nothing() {
        let addresses = ["[::1]:1", "1.1.1.1:1", "1.1.1.2:1"].map(address);
        let began = Instant::now();
        let won = race(&addresses, |address| async move {
            match address.port() {
                _ if address.is_ipv6() => std::future::pending().await,
                _ if address.ip().to_string().ends_with(".1") => {
                    Err(Error::from(ErrorKind::ConnectionRefused))
                }
                _ => Ok(address),
            }
        });
        assert_eq!(won.await.unwrap(), addresses[2]);
        assert_eq!(began.elapsed(), STAGGER);
    }

    #[tokio::test(start_paused = true)]
    async fn when_none_answers_each_is_named() {
        let addresses = ["[::1]:1", "1.1.1.1:1"].map(address);
        let refuse = |_| async { Err::<(), _>(Error::from(ErrorKind::ConnectionRefused)) };
        let error = race(&addresses, refuse).await.unwrap_err();
        assert!(
            error.contains("[::1]:1: ") && error.contains("; 1.1.1.1:1: "),
            "{error}"
        );
    }

    #[tokio::test]
    async fn a_name_without_an_address_is_named() {
        let error = connect("no-such-host.invalid", 1).await.unwrap_err();
        assert!(error.contains("no-such-host.invalid"), "{error}");
    }
}
