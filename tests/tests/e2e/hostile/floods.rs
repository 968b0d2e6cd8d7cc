//! Too much of everything.

use std::net::SocketAddr;
use std::time::Duration;

use skerry_proto::link::{
    ConfirmRequest, Heartbeat, PodStatusReport, Report, ReportDrops, edge_bulk, edge_control, report,
};
use skerry_tests::hostile::{answer, bulk, client, control, stranger};
use skerry_tests::runner::Test;
use skerry_tests::site::{Runtime, Site};
use skerry_tests::wait::SOON;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;
use tonic::Code;
use tonic::transport::Channel;

use super::streams::alive;
use super::{hostile, run, session_of};

/// What the provider may grow by while one site floods it. It keeps 16 MiB of its reports; the rest is the allocator's.
const GROWTH_KIB: u64 = 128 * 1024;

pub(super) fn flood(t: &Test<'_>) {
    let (_site, hostile) = hostile(t);
    let victim = session_of(t.site());
    let before = t.cluster.provider_memory_kib();
    run(async {
        let mut session = hostile.session().await.empty().await;
        let drops = (0..20_000).map(|number| ReportDrops {
            lane: format!("lane-{number}\n"),
            reason: "\"".into(),
            count: u64::MAX,
        });
        let beat = Heartbeat {
            seq: u64::MAX,
            outbox: u64::MAX,
            dropped: u64::MAX,
            drops: drops.collect(),
            round_trip_micros: u64::MAX,
            shed: u64::MAX,
            used_today: u64::MAX,
            deferring: 77,
            ..Default::default()
        };
        session
            .control
            .send
            .send(control(edge_control::Message::Heartbeat(beat)))
            .await
            .unwrap();
        assert_eq!(alive(&mut session).await, Ok(()), "after absurd figures");

        // Results are not read: the provider must stop reading, and not keep what comes.
        let body = PodStatusReport {
            uid: "made-up".into(),
            status_json: vec![b' '; 1024 * 1024].into(),
            ..Default::default()
        };
        let mut sent = 0_u64;
        for seq in 1..=2_000 {
            let report = Report {
                seq,
                report: Some(report::Report::PodStatus(body.clone())),
                ..Default::default()
            };
            let message = bulk(edge_bulk::Message::Report(report));
            let room = tokio::time::timeout(Duration::from_secs(2), session.bulk.send.send(message)).await;
            if !matches!(room, Ok(Ok(()))) {
                break;
            }
            sent = seq;
        }
        let grown = t.cluster.provider_memory_kib().saturating_sub(before);
        assert!(
            grown < GROWTH_KIB,
            "{grown} KiB more after {sent} reports of 1 MiB"
        );
        // Sessions by the dozen: each ends the one before, and nobody else's.
        for _ in 0..30 {
            drop(hostile.session().await);
        }
        // Connections without end: the oldest go.
        let mut channels = Vec::new();
        for _ in 0..40 {
            channels.push(hostile.channel().await);
        }
        let usable = async |channel: &Channel| {
            let mut client = client(channel);
            answer(client.confirm(ConfirmRequest {})).await.is_ok()
        };
        assert!(
            !usable(&channels[0]).await,
            "the oldest of 40 connections is still open"
        );
        assert!(
            usable(&channels[39]).await,
            "the newest of 40 connections was closed"
        );
    });
    assert_eq!(session_of(t.site()), victim, "the victim's session");
    assert!(t.site().running());
}

pub(super) fn siege(t: &Test<'_>) {
    let link = t.cluster.link();
    let attacker: SocketAddr = ([127, 0, 0, 2], 0).into();
    run(async {
        let idle = stranger(link).await.unwrap();
        let mut held = Vec::new();
        for number in 0..600 {
            let socket = TcpSocket::new_v4().unwrap();
            socket.bind(attacker).unwrap();
            let mut stream = socket.connect(link).await.unwrap();
            if number % 2 == 0 {
                // The beginning of a ClientHello, and no more.
                stream
                    .write_all(&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3])
                    .await
                    .unwrap();
            }
            held.push(stream);
        }
        // From elsewhere one comes in as ever. Were it in line with the others, it would not within minutes.
        tokio::task::block_in_place(|| {
            let site = Site::start(t.cluster, &t.name("site"), Runtime::Process);
            assert!(site.running());
        });
        // The first were told to go by now.
        let mut end = Vec::new();
        let closed = held[0].read_to_end(&mut end);
        tokio::time::timeout(SOON, closed)
            .await
            .expect("a handshake is given up in time")
            .ok();
        // A stranger may not stay either.
        let mut idle = client(&idle);
        let sent_away = async {
            while let Err(status) = answer(idle.confirm(ConfirmRequest {})).await
                && status.code() == Code::Unauthenticated
            {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        };
        tokio::time::timeout(SOON, sent_away)
            .await
            .expect("a client without a certificate is sent away");
    });
}
