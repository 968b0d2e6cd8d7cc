//! Greetings, streams, inventories and tunnels.

use std::process::Stdio;

use skerry_proto::link::{
    Applied, BulkHello, EdgeControl, GroupDigest, Heartbeat, Hello, Inventory, InventoryDigest,
    InventoryEntry, Kind, NodeStatusReport, TunnelError, TunnelFrame, TunnelOpen, TunnelReady, change,
    cloud_bulk, cloud_control, edge_bulk, edge_control, report, tunnel_frame,
};
use skerry_tests::hostile::{Hostile, Session, answer, bulk, client, control, next, stream};
use skerry_tests::pods::ready;
use skerry_tests::process::text;
use skerry_tests::runner::Test;
use skerry_tests::wait::{SOON, eventually, same};
use tonic::Code;

use super::{Book, hostile, run, session_of};

const TOO_LARGE: usize = 5 * 1024 * 1024;

pub(super) fn refusals(t: &Test<'_>) {
    let (site, hostile) = hostile(t);
    let victim = t.site();
    let stolen = session_of(victim);
    let mut book = Book::default();
    run(async {
        greetings(&mut book, &hostile, victim.name()).await;
        streams(&mut book, &hostile, &stolen).await;
    });
    book.close(30);
    // The victim has the session that it had.
    assert_eq!(session_of(victim), stolen);
    assert!(t.cluster.provider_said(&format!(
        "a call was refused call=\"Control\" site=\"{}\"",
        site.name()
    )));
}

async fn greetings(book: &mut Book, hostile: &Hostile, victim: &str) {
    let changed = |change: &dyn Fn(&mut Hello)| {
        let mut hello = hostile.hello();
        change(&mut hello);
        control(edge_control::Message::Hello(hello))
    };
    let named = |name: &str| changed(&|hello: &mut Hello| hello.site = name.to_owned());
    let long = "x".repeat(300);
    let huge = "x".repeat(TOO_LARGE);
    let beat = control(edge_control::Message::Heartbeat(Heartbeat {
        seq: 1,
        ..Default::default()
    }));
    let (wrong, denied, old) = (
        Code::InvalidArgument,
        Code::PermissionDenied,
        Code::FailedPrecondition,
    );
    let cases: Vec<(&str, EdgeControl, Code, &str)> = vec![
        ("a heartbeat before the greeting", beat, wrong, "must be Hello"),
        (
            "an empty first message",
            EdgeControl::default(),
            wrong,
            "must be Hello",
        ),
        (
            "another site's name",
            named(victim),
            denied,
            "the certificate is for site",
        ),
        (
            "a name that nobody has",
            named("nobody"),
            denied,
            "the certificate is for site",
        ),
        ("no name", named(""), denied, "the certificate is for site"),
        (
            "a path for a name",
            named("../../etc/passwd"),
            denied,
            "the certificate is for site",
        ),
        (
            "a name with a line break",
            named("a\nlevel=ERROR"),
            denied,
            "the certificate is for site",
        ),
        (
            "no protocol",
            changed(&|h| (h.protocol_min, h.protocol_max) = (0, 0)),
            old,
            "no common protocol",
        ),
        (
            "a protocol of tomorrow",
            changed(&|h| (h.protocol_min, h.protocol_max) = (99, 99)),
            old,
            "no common protocol",
        ),
        (
            "a protocol range upside down",
            changed(&|h| (h.protocol_min, h.protocol_max) = (9, 1)),
            old,
            "no common protocol",
        ),
        (
            "a long version",
            changed(&|h| h.version = long.clone()),
            wrong,
            "version is longer",
        ),
        (
            "a long boot id",
            changed(&|h| h.boot_id = long.clone()),
            wrong,
            "boot_id is longer",
        ),
        (
            "a long store id",
            changed(&|h| h.store_id = long.clone()),
            wrong,
            "store_id is longer",
        ),
        (
            "a long instance",
            changed(&|h| h.instance = long.clone()),
            wrong,
            "instance is longer",
        ),
        ("a long name", named(&long), wrong, "site is longer"),
        (
            "many features",
            changed(&|h| h.features = vec!["f".into(); 65]),
            wrong,
            "features is longer",
        ),
        (
            "a long feature",
            changed(&|h| h.features = vec![long.clone()]),
            wrong,
            "features is longer",
        ),
        (
            "a greeting of 5 MiB",
            changed(&|h| h.version = huge.clone()),
            Code::OutOfRange,
            "too large",
        ),
    ];
    for (attack, first, code, words) in cases {
        let outcome = hostile.control(vec![first]).await;
        book.refused(attack, outcome, code, words);
    }
    let (send, messages) = stream(Vec::<EdgeControl>::new());
    drop(send);
    let channel = hostile.channel().await;
    let outcome = answer(client(&channel).control(messages)).await;
    book.refused(
        "a Control that ends before it begins",
        outcome,
        wrong,
        "ended before its first message",
    );
}

async fn streams(book: &mut Book, hostile: &Hostile, stolen: &str) {
    let (wrong, over) = (Code::InvalidArgument, Code::Aborted);
    let hello = |session: &str| {
        bulk(edge_bulk::Message::Hello(BulkHello {
            session: session.to_owned(),
        }))
    };
    let huge = "x".repeat(TOO_LARGE);
    let applied = bulk(edge_bulk::Message::Applied(Applied::default()));
    for (attack, first, code, words) in [
        ("Bulk without a greeting", applied, wrong, "must be BulkHello"),
        ("Bulk of a session that never was", hello("0000"), over, "is over"),
        ("Bulk of no session", hello(""), over, "is over"),
        ("Bulk of another site's session", hello(stolen), over, "is over"),
        (
            "Bulk of a session with a name of 5 MiB",
            hello(&huge),
            Code::OutOfRange,
            "too large",
        ),
    ] {
        book.refused(attack, hostile.bulk(vec![first]).await, code, words);
    }
    let own = hostile.session().await;
    let open = |session: &str, id: &str| {
        let open = TunnelOpen {
            session: session.to_owned(),
            id: id.to_owned(),
        };
        TunnelFrame {
            frame: Some(tunnel_frame::Frame::Open(open)),
        }
    };
    let data = TunnelFrame {
        frame: Some(tunnel_frame::Frame::Data(vec![0; 10].into())),
    };
    for (attack, first, code, words) in [
        (
            "a tunnel that begins with data",
            data,
            wrong,
            "must be TunnelOpen",
        ),
        (
            "a tunnel of another site's session",
            open(stolen, "1"),
            over,
            "is over",
        ),
        (
            "a tunnel of a session that never was",
            open("0000", "1"),
            over,
            "is over",
        ),
        (
            "a tunnel that nobody asked for",
            open(&own.id, "1"),
            Code::NotFound,
            "no such tunnel",
        ),
        (
            "a tunnel with a path for a name",
            open(&own.id, "../1"),
            Code::NotFound,
            "no such tunnel",
        ),
    ] {
        let channel = hostile.channel().await;
        let (_send, frames) = stream(vec![first]);
        let outcome = match answer(client(&channel).tunnel(frames)).await {
            Ok(mut frames) => next(frames.get_mut()).await.map(drop),
            Err(status) => Err(status),
        };
        book.refused(attack, outcome, code, words);
    }
    // A second greeting is no greeting.
    let mut own = own.empty().await;
    let second = Hello {
        site: "another".into(),
        ..hostile.hello()
    };
    own.control
        .send
        .send(control(edge_control::Message::Hello(second)))
        .await
        .unwrap();
    book.expect("a second greeting", alive(&mut own).await);
}

/// The session goes on: a heartbeat is answered.
pub(super) async fn alive(session: &mut Session) -> Result<(), String> {
    let beat = Heartbeat {
        seq: 4_711,
        ..Default::default()
    };
    let beat = control(edge_control::Message::Heartbeat(beat));
    session
        .control
        .send
        .send(beat)
        .await
        .map_err(|_| "the session is over")?;
    loop {
        let message = next(&mut session.control.receive)
            .await
            .map_err(|e| e.to_string())?;
        match message.ok_or("the session is over")?.message {
            Some(cloud_control::Message::HeartbeatAck(ack)) if ack.seq == 4_711 => return Ok(()),
            _ => {}
        }
    }
}

pub(super) fn violations(t: &Test<'_>) {
    use edge_bulk::Message::{Applied as Ack, Inventory as Tell, InventoryDigest as Digest};
    let (_site, hostile) = hostile(t);
    let nothing = || Inventory {
        entries: Vec::new(),
        last: true,
    };
    let group = |sum: usize, buckets: usize| {
        let objects = GroupDigest {
            count: 1,
            sum: vec![1; sum].into(),
            buckets: vec![1; buckets].into(),
        };
        InventoryDigest {
            objects: Some(objects),
            tokens: None,
        }
    };
    let ack = |seq: u64| Applied {
        seq,
        objects_sum: vec![1; 3].into(),
        tokens_sum: vec![1; 3].into(),
    };
    let part = |number: u64| Inventory {
        entries: (0..2_000)
            .map(|entry| InventoryEntry {
                kind: Kind::Pod.into(),
                uid: format!("{number}-{entry}"),
                ..Default::default()
            })
            .collect(),
        last: false,
    };
    let wrong = Code::InvalidArgument;
    let cases = vec![
        (
            "an acknowledgement of what was never sent",
            vec![Tell(nothing()), Ack(ack(u64::MAX))],
            wrong,
            "never sent",
        ),
        (
            "an inventory after the inventory",
            vec![Tell(nothing()), Tell(nothing())],
            wrong,
            "was not asked for",
        ),
        (
            "a digest after the inventory",
            vec![Tell(nothing()), Digest(group(16, 0))],
            wrong,
            "was not asked for",
        ),
        (
            "a digest with a short sum",
            vec![Digest(group(3, 0))],
            wrong,
            "malformed digest",
        ),
        (
            "a digest with half a bucket",
            vec![Digest(group(16, 12))],
            wrong,
            "malformed digest",
        ),
        (
            "a digest with too many buckets",
            vec![Digest(group(16, 8 * 1_025))],
            wrong,
            "malformed digest",
        ),
        (
            "an inventory that never ends",
            (0..101).map(|n| Tell(part(n))).collect(),
            Code::ResourceExhausted,
            "more than",
        ),
    ];
    let mut book = Book::default();
    run(async {
        for (attack, messages, code, words) in cases {
            let mut session = hostile.session().await;
            for message in messages {
                session.say(message).await;
            }
            book.refused(attack, session.end().await, code, words);
        }
        // What is unknown is passed over.
        let mut session = hostile.session().await;
        let foreign = InventoryEntry {
            kind: 9_999,
            uid: "u".into(),
            hash: vec![1; 5].into(),
            expires_unix: -1,
        };
        session
            .say(Tell(Inventory {
                entries: vec![foreign],
                last: true,
            }))
            .await;
        session.say(edge_bulk::Message::Applied(Applied::default())).await;
        book.expect("kinds and hashes of tomorrow", alive(&mut session).await);
    });
    book.close(8);
}

pub(super) fn nothing_learnt(t: &Test<'_>) {
    let secret = serde_json::json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "theirs"},
        "stringData": {"key": "value"}});
    t.kubectl.apply(&secret.to_string());
    let spec = serde_json::json!({"containers": [{"command": ["sh", "-c", "sleep 1000"],
        "envFrom": [{"secretRef": {"name": "theirs"}}]}]});
    t.kubectl.apply(&t.site().pod("victim", spec));
    let uid = |kind: &str, name: &str| {
        t.kubectl.get(kind, name).unwrap()["metadata"]["uid"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    ready(&t.kubectl, "victim");
    let (pod, secret) = (uid("pod", "victim"), uid("secret", "theirs"));
    let (site, hostile) = hostile(t);
    let own = t.kubectl.get("site", site.name()).unwrap()["metadata"]["uid"]
        .as_str()
        .unwrap()
        .to_owned();
    let made_up = "00000000-0000-4000-8000-000000000000".to_owned();
    let claimed = [
        (Kind::Pod, &pod),
        (Kind::Secret, &secret),
        (Kind::Pod, &made_up),
        (Kind::Secret, &made_up),
    ];
    let entries = claimed.map(|(kind, uid)| InventoryEntry {
        kind: kind.into(),
        uid: uid.clone(),
        ..Default::default()
    });
    run(async {
        let mut session = hostile.session().await;
        let inventory = Inventory {
            entries: entries.to_vec(),
            last: true,
        };
        session.say(edge_bulk::Message::Inventory(inventory)).await;
        let (mut sent, mut removed) = (Vec::new(), Vec::new());
        loop {
            let message = next(&mut session.bulk.receive).await.unwrap().unwrap();
            match message.message {
                Some(cloud_bulk::Message::Change(change)) => match change.change {
                    Some(change::Change::Upsert(object)) => sent.push(object.uid),
                    Some(change::Change::Remove(object)) => removed.push((object.kind(), object.uid)),
                    None => {}
                },
                Some(cloud_bulk::Message::Synced(_)) => break,
                _ => {}
            }
        }
        // What is another's is answered like what does not exist.
        assert_eq!(sent, [own], "its own Site, and nothing else");
        removed.sort();
        let mut all = claimed.map(|(kind, uid)| (kind, uid.clone()));
        all.sort();
        assert_eq!(removed, all);
    });
    ready(&t.kubectl, "victim");
}

pub(super) fn rubbish(t: &Test<'_>) {
    let (site, hostile) = hostile(t);
    let node = site.name().to_owned();
    let pod = serde_json::json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"},
        "spec": {"nodeName": node, "containers": [{"name": "c", "image": "i"}]}});
    run(async {
        let mut session = hostile.session().await.empty().await;
        let status = serde_json::json!({"conditions": [{"type": "Ready", "status": "True"}]});
        let status = NodeStatusReport {
            status_json: status.to_string().into(),
            ..Default::default()
        };
        session
            .report(Some(report::Report::NodeStatus(status)))
            .await
            .unwrap();
        tokio::task::block_in_place(|| {
            eventually(SOON, "the Node is there", || {
                t.kubectl.get("node", &node).map(drop)
            });
            t.kubectl.apply(&pod.to_string());
            eventually(SOON, "the pod is bound", || {
                same(
                    t.kubectl.get("pod", "pod")?["spec"]["nodeName"].as_str(),
                    Some(node.as_str()),
                )
            });
        });
        use tunnel_frame::Frame;
        let ready = |status: u32| {
            Frame::Ready(TunnelReady {
                status,
                headers: Vec::new(),
            })
        };
        let error = |status: u32, message: &str| {
            Frame::Error(TunnelError {
                status,
                message: message.to_owned(),
            })
        };
        for (attack, frames, said) in [
            (
                "data before it is ready",
                vec![Frame::Data(vec![b'x'; 10].into())],
                "sent data before it was ready",
            ),
            ("nothing at all", vec![], "ended the stream without an answer"),
            (
                "an error that is a success",
                vec![error(200, "all is well")],
                "all is well",
            ),
            (
                "an error with a status of its own",
                vec![error(70_000, "made up")],
                "made up",
            ),
            (
                "a stream that breaks off",
                vec![ready(200), error(500, "broken on purpose")],
                // A part of an answer has no words of its own.
                "Error from server",
            ),
        ] {
            let mut logs = t.kubectl.command(&["logs", "pod"]);
            let logs = logs
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            let mut over = tokio::task::spawn_blocking(|| logs.wait_with_output());
            // The API server may ask more than once; each time it hears the same.
            let out = loop {
                let message = tokio::select! {
                    out = &mut over => break out.unwrap().unwrap(),
                    message = next(&mut session.control.receive) => message.unwrap().expect("an order"),
                };
                let Some(cloud_control::Message::OpenTunnel(order)) = message.message else {
                    continue;
                };
                let open = Frame::Open(TunnelOpen {
                    session: session.id.clone(),
                    id: order.id,
                });
                let frames: Vec<TunnelFrame> = std::iter::once(open)
                    .chain(frames.clone())
                    .map(|frame| TunnelFrame { frame: Some(frame) })
                    .collect();
                let channel = hostile.channel().await;
                let (send, frames) = stream(frames);
                drop(send);
                // It is held until the provider ends it; the next order does not wait for that.
                tokio::spawn(async move {
                    if let Ok(mut tunnel) = answer(client(&channel).tunnel(frames)).await {
                        while let Ok(Some(_)) = next(tunnel.get_mut()).await {}
                    }
                });
                assert_eq!(alive(&mut session).await, Ok(()), "{attack}");
            };
            assert!(text(&out).contains(said), "{attack}: {}", text(&out));
            assert!(!out.status.success(), "{attack}: {}", text(&out));
        }
        assert_eq!(alive(&mut session).await, Ok(()));
    });
    t.kubectl
        .run(&["delete", "pod", "pod", "--force", "--grace-period=0"]);
}
