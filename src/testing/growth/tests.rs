use super::*;

#[test]
fn each_connection_sends_one_message_in_a_hundred_rounds() {
    let mut connections = ManyConnections::open(1_000);
    connections.exchange_messages(100);
    assert_eq!(connections.messages(), 1_000);
    let mut tokens: Vec<_> = (0..1_000).map(|number| number * STRIDE % 1_000).collect();
    tokens.sort_unstable();
    tokens.dedup();
    assert_eq!(tokens.len(), 1_000);
}
